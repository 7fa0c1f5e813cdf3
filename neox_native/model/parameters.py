"""Cards: what the rest of the house must know of a parameter. Mathematics alone; the model knows no rank.

[Note: cards] Each layer kind writes one card for each of its parameters. Initial values, weight decay, tensor-parallel
cuts, sums of partial gradients, ZeRO's units, parameter counts and the planner read the cards; nothing is decided by a
parameter's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Initial = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""Makes the first value from a shape and a random generator, in fp32 on the CPU."""


def constant(value: float) -> Initial:
    """Every element is `value`."""
    return lambda shape, _generator: torch.full(shape, value)


def normal(deviation: float) -> Initial:
    """Independent normal numbers around 0 with this standard deviation."""
    return lambda shape, generator: torch.empty(shape).normal_(0.0, deviation, generator=generator)


@dataclass(frozen=True)
class RowGroups:
    """The dim-0 rows of a parameter come in equal groups. A group's first rows can be dealt out among several holders; its
    last rows cannot, and each holder of the group has a copy. Grouped-query attention has such groups: the queries that
    attend to one key-value head, and that head."""

    count: int
    """Groups."""
    own: int
    """Rows of a group that can be dealt out."""
    copied: int
    """Rows of a group of which each holder has a copy."""


@dataclass(frozen=True)
class Card:
    """One parameter. See [Note: cards]."""

    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    init: Initial
    """Its first value."""
    decay: bool = True
    """Whether weight decay applies."""
    cut: int | None = None
    """The dim that tensor parallelism may cut; None: every holder has the whole parameter."""
    gradient: Literal["whole", "partial", "partial_in_sequence"] = "whole"
    """What one holder computes of the gradient of a parameter that is not cut: all of it; its share of a sum, because it
    has seen its share of the heads or channels; or a share only where holders see different tokens (sequence parallelism)."""
    family: Literal["dense", "expert"] = "dense"
    """Whether every token uses it, or the tokens that are sent to its expert."""
    role: Literal["matrix", "vector", "embedding", "head"] = "matrix"
    """What it is to an update rule."""
    lr_multiplier: float = 1.0
    """Its learning rate over the run's."""
    groups: RowGroups | None = None
    """For rows that cannot be cut anywhere: see `RowGroups`."""

    @property
    def num_elements(self) -> int:
        """Elements of the whole parameter."""
        return torch.Size(self.shape).numel()

    def has_partial_gradient(self, sequence_cut: bool) -> bool:
        """Whether one holder computes a share of the gradient, so that shares must be summed. `sequence_cut`: holders see
        different tokens of the residual stream."""
        return self.gradient == "partial" or self.gradient == "partial_in_sequence" and sequence_cut


Cards = dict[str, Card]


def vector(size: int, value: float, **facts: Any) -> Card:
    """A bias or a norm's weight: constant at first, not decayed."""
    return Card((size,), constant(value), decay=False, role="vector", **facts)


def under(prefix: str, cards: Cards) -> Cards:
    """The same cards as parameters of a submodule."""
    return {f"{prefix}.{name}": card for name, card in cards.items()}
