"""Layer kinds by name. A kind is one file: a module that knows no rank, a card for each parameter, and its costs.

A module of a kind maps x̂ [B, T, D], normalised and scaled, and the `Context` to its branch [B, T, D]. Its last projection
is an `OutputLinear`, whose bias the block adds once after all branches are joined: the module's `output_bias`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn as nn

from neox_native.config.schema import Model
from neox_native.errors import UserError
from neox_native.model.parameters import Cards

if TYPE_CHECKING:
    from neox_native.model.costs import Costs


@dataclass(frozen=True)
class Kind:
    """One kind of layer."""

    name: str
    """In `model.pattern`."""
    build: Callable[[Model], nn.Module]
    cards: Callable[[Model], Cards]
    """By the parameter's name in the module."""
    module: str
    """Name of its module in a block, and so in checkpoints."""
    norm: str
    """Name in the block of the learned half of its norm."""
    costs: Callable[[Model], Costs] | None = None
    """None: it trains, but nobody predicts its memory and its speed."""
    dealt: Callable[[Model, int], Model] = lambda model, holders: model
    """The model whose even parts so many holders have, where parts of this model overlap. See `RowGroups`."""


KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Make a kind known by its name."""
    assert kind.name not in KINDS and "+" not in kind.name, kind.name
    KINDS[kind.name] = kind
    return kind


def kinds_of_layers(model: Model) -> list[tuple[Kind, ...]]:
    """The kinds of each layer of the whole model: `model.pattern`, repeated.

    Raises:
        UserError: the pattern names a kind that does not exist, or one twice in a layer.
    """
    for entry in model.pattern:
        names = entry.split("+")
        if unknown := [name for name in names if name not in KINDS]:
            raise UserError(f"model.pattern names the layer kind {unknown[0]!r}; the known are {', '.join(sorted(KINDS))}.")
        if len(set(names)) < len(names):
            raise UserError(f"model.pattern: {entry!r} names a kind twice in one layer; write two layers, each with one of them.")
    patterns = [tuple(KINDS[name] for name in entry.split("+")) for entry in model.pattern]
    return [patterns[number % len(patterns)] for number in range(model.num_layers)]
