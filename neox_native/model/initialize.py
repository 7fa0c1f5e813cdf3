"""Initial weights that do not depend on the layout: every full parameter is a pure function of (seed, its name)."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from neox_native.config.schema import Model
from neox_native.model.parameters import Card


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed for the stream called `name` of the run seeded with `seed`."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def standard_deviation(method: str, model: Model) -> float:
    """Standard deviation of an initialisation method, as GPT-NeoX defines it.

    small_init is sqrt(2 / (5 h)) (Nguyen and Salazar 2019), wang_init 2 / (L sqrt(h)) (Wang and Komatsuzaki 2021),
    scaled_normal init_std / sqrt(2 L) (Radford et al. 2019 §2.3).
    """
    return {
        "small_init": math.sqrt(2 / (5 * model.hidden_size)),
        "wang_init": 2 / (model.num_layers * math.sqrt(model.hidden_size)),
        "normal": model.init_std,
        "scaled_normal": model.init_std / math.sqrt(2 * model.num_layers),
    }[method]


def draw(name: str, card: Card, seed: int) -> Tensor:
    """The full initial value of the parameter of this global name: fp32, on the CPU, the same on every rank of every
    layout."""
    return card.init(card.shape, torch.Generator().manual_seed(seed_of(seed, name)))
