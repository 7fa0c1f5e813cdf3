"""Dropout masks as functions of a seed.

[Note: masks] A place that drops (the embedding, each layer) seeds the random stream before it draws, with a number made of the
run's seed, the first sample of the microbatch and the layer. Nothing else decides: not the ranks, what a rank computed
before, nor how often. So masks are the same under every number of replicas and stages and every schedule, a layer that is
recomputed draws what it drew, and a resume has no random state to restore. A mask covers what one rank computes at a time,
so another micro batch size draws others, and another number of slices of the layers may.
"""

from __future__ import annotations

import torch


def generator_of(device: torch.device) -> torch.Generator:
    """What masks on `device` are drawn from: a GPU has a generator of its own."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def seed_masks(device: torch.device, seed: int | None) -> None:
    """Let what is drawn on `device` from now on depend on `seed` alone; None lets the stream go on. Waits for no device."""
    if seed is not None:
        generator_of(device).manual_seed(seed)
