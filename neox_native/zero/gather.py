"""When parameters are whole: gathered just before a unit runs, one unit ahead, and in stage 3 released after it.

[Note: gather] In stages 1 and 2 all parameters are stale after an update, and each unit waits for its own gather in the
next forward pass, while the gather of the unit after it is under way. Stage 3 does the same in every forward pass,
releases the unit after its forward, gathers it again when the gradient of its output is there (and the unit before it,
which comes next in backward), and releases it when its own gradients have left. A unit with frozen parameters cannot
tell that it is through, nor can one that lacks a gradient: it is released when the unit before it begins, or at the end.
Gathers and reductions share a group, so in stage 3 all data-parallel ranks must run the same units and give gradients
to the same parameters; which ones may change from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from neox_native.zero.bucket import at_end_of_backward
from neox_native.zero.weights import UnitWeights


class Presence(Enum):
    """Whether a unit's parameters can be read; P is its number of parameters."""

    STALE = auto()
    """Stages 1 and 2: storage P, old values. Stage 3: released, storage P / d."""
    COMING = auto()
    """The gather is under way: P more, its output."""
    PRESENT = auto()
    """Storage P, current values."""


class Gatherer:
    """Gathers and releases the units of one pipeline stage. See [Note: gather]."""

    def __init__(self, units: Sequence[UnitWeights], releases: bool):
        self.units, self.releases = list(units), releases
        self.presence = [Presence.STALE if releases else Presence.PRESENT] * len(units)
        self.all_stale = releases
        """Whether frozen parameters are stale, too."""
        self.watching = False
        """Whether the end of the current backward pass will be noticed."""

    def install(self, index: int, modules: Sequence[nn.Module]) -> None:
        """Hook the modules that read unit `index`, which run in this order."""
        for module in modules:
            module.register_forward_pre_hook(lambda _module, _inputs: self._before_forward(index))
        if self.releases:
            modules[-1].register_forward_hook(lambda _module, _inputs, output: self._after_forward(index, output))

    def expire(self, frozen_too: bool = False) -> None:
        """The masters have changed: parameters must be gathered before they are read."""
        for index in range(len(self.units)):
            self.drop(index)
            self.presence[index] = Presence.STALE
        self.all_stale = frozen_too or self.releases

    def settle(self) -> None:
        """A backward pass begins: end gathers that the forward pass started in vain, for they use its memory."""
        for index, presence in enumerate(self.presence):
            if presence is Presence.COMING:
                self.need(index)

    def need(self, index: int) -> None:
        """Make unit `index` present for what the compute stream does next."""
        self._prefetch(index)
        if self.presence[index] is Presence.COMING:
            self.units[index].finish_gathering()
            self.presence[index] = Presence.PRESENT

    def drop(self, index: int) -> None:
        """Give up a gather of unit `index` that is under way; in stage 3, release the unit."""
        if self.presence[index] is Presence.COMING:
            self.units[index].abandon_gathering()
            self.presence[index] = Presence.STALE
        elif self.presence[index] is Presence.PRESENT and self.releases:
            self.units[index].release()
            self.presence[index] = Presence.STALE

    def through_with(self, index: int, position: int, everything: bool) -> None:
        """The gradient of one parameter is there, so every node of the backward pass that reads it has run: stage 3
        releases it, before the gradient asks for memory. With `everything`, it was the unit's last."""
        if self.releases:
            self.units[index].release(position)
            if everything and not self.units[index].has_frozen:
                self.drop(index)

    def _prefetch(self, index: int) -> None:
        if 0 <= index < len(self.units) and self.presence[index] is Presence.STALE:
            self.units[index].start_gathering(self.all_stale)
            self.presence[index] = Presence.COMING

    def _before_forward(self, index: int) -> None:
        self.need(index)
        if not inside_backward():  # a recomputed forward has the unit before it next, and that is on its way
            self._prefetch(index + 1)

    def _after_forward(self, index: int, output: Any) -> None:
        if inside_backward():
            return
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _gradient: self._before_backward(index))
        self.drop(index)

    def _before_backward(self, index: int) -> None:
        if not self.watching:
            self.watching = True
            at_end_of_backward(self._after_backward)
        self.need(index)
        self._prefetch(index - 1)
        if index + 1 < len(self.units):
            self.drop(index + 1)

    def _after_backward(self) -> None:
        self.watching = False
        for index in range(len(self.units)):
            self.drop(index)


def inside_backward() -> bool:
    """Whether this is a forward pass that activation checkpointing repeats inside the backward pass."""
    return torch._C._current_graph_task_id() != -1
