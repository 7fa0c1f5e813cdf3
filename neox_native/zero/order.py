"""What is gathered next and what is reduced next: the units of one pipeline stage in the order in which they run.

[Note: gather] In stages 1 and 2 all parameters are stale after an update, and each unit waits for its own gather in the
next forward pass, while the gather of the unit after it is under way. Stage 3 does the same in every forward pass,
releases the unit after its forward, gathers it again when the gradient of its output is there (and the unit before it,
which comes next in backward), and releases it when its own gradients have left. A unit with frozen parameters cannot
tell that it is through, nor can one that lacks a gradient: it is released when the unit before it begins, or at the end.
What ends a forward pass begins the backward pass, so it stays for that, unless another forward pass comes first. Nothing
is gathered to differentiate a unit of embedding tables, whose gradients do not depend on their values.

[Note: reduce] Units are reduced while backward runs, the last one first and always in that order: a rank on which a
parameter happens to receive no gradient must not reduce another unit than its peers. Where shards have replicas in other
groups, the step's last reduction of a unit is followed by a sum over these, which begins when the reduction is waited for.

Gathers and reductions share a group, so in stage 3 all ranks of a group must run the same units and give gradients to
the same parameters; which ones may change from step to step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neox_native.zero.unit import ShardedUnit, State


class UnitsOfStage:
    """The units of one pipeline stage, which `install_hooks` lets follow what autograd does. See [Note: gather] and
    [Note: reduce].

    Args:
        units: in the order in which they run.
        keeps_end: whether units of stage 3 that end a forward pass stay for the backward pass.
    """

    def __init__(self, units: Sequence[ShardedUnit], keeps_end: bool):
        self.units, self.keeps_end = list(units), keeps_end
        self.reduced = [unit for unit in reversed(self.units) if unit.gradients.shards]
        """Units with gradients, in the order of their reductions."""
        self.due: deque[ShardedUnit] = deque()
        """Those that the current backward pass has yet to reduce."""
        self.in_flight: deque[ShardedUnit] = deque()
        self.max_in_flight = min((unit.gradients.max_in_flight for unit in self.reduced), default=1)
        self.at_end = False
        """Whether a forward pass has come to its last unit, and no other has begun."""
        self.watching = False
        """Whether the end of the current backward pass will be noticed."""
        self.last = False
        """Whether the current backward pass is the step's last."""

    def install_hooks(self) -> None:
        """Collect gradients as they come; make parameters present when modules run."""
        for index, unit in enumerate(self.units):
            for position in range(len(unit.gradients.shards)):
                for parameter in unit.specs[position].parameters:
                    parameter.register_post_accumulate_grad_hook(lambda _p, u=unit, j=position: self._on_gradient(u, j))
            modules = unit.modules if unit.zero_stage else ()
            for module in modules:
                module.register_forward_pre_hook(lambda _module, _inputs, i=index: self._before_forward(i))
            if unit.releases:
                modules[-1].register_forward_hook(lambda _m, _inputs, output, i=index: self._after_forward(i, output))
        self.units[0].modules[0].register_forward_pre_hook(lambda _module, _inputs: self._on_forward())

    def begin(self, last: bool) -> None:
        """A backward pass begins; `last` if it is the step's last."""
        for unit in self.units:
            unit.gradients.begin()
            if State.GATHERING in unit.state:  # started in vain by the forward pass: a gather uses memory until it ends
                unit.make_present()
        self._flush()  # in case the pass before delivered no gradient at all
        self.due.extend(unit for unit in self.reduced if not unit.gradients.keeps_matrix or last and not unit.gradients.num_reductions)
        self.watching, self.last = False, last

    @torch.no_grad()
    def absorb(self) -> None:
        """Take every gradient that lies in `.grad`, which no hook has seen."""
        for unit in self.units:
            for position in range(len(unit.gradients.shards)):
                unit.gradients.take(position)

    def finish(self) -> None:
        """The step's backward passes are over: reduce the rest and wait for the results."""
        self._flush()
        self.due.extend(unit for unit in self.reduced if unit.gradients.num_reductions == 0)
        self.last = True
        self._flush()
        while self.in_flight:
            self.in_flight.popleft().gradients.finish()
        for unit in self.reduced:
            unit.gradients.close()

    def _on_forward(self) -> None:
        """The stage's forward pass begins: the last step's gradients make room for its activations. Not so in an evaluation
        or a recomputation."""
        if torch.is_grad_enabled() and not _inside_backward():
            for unit in self.units:
                unit.gradients.forget()

    def _before_forward(self, index: int) -> None:
        if self.at_end and not _inside_backward():
            self.at_end = False
            self._release()
        self.units[index].make_present()
        if not _inside_backward():  # a recomputed forward has the unit before it next, and that is on its way
            self._prefetch(index + 1)

    def _after_forward(self, index: int, output: Any) -> None:
        if _inside_backward():
            return
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _gradient: self._before_backward(index))
        self.at_end |= self.keeps_end and torch.is_grad_enabled() and index == len(self.units) - 1
        if not self.at_end:
            self.units[index].drop()

    def _before_backward(self, index: int) -> None:
        self._watch()
        if self.units[index].differentiates_values:
            self.units[index].make_present()
        if index and self.units[index - 1].differentiates_values:
            self._prefetch(index - 1)
        if index + 1 < len(self.units):
            self.units[index + 1].drop()

    def _on_gradient(self, unit: ShardedUnit, position: int) -> None:
        """Autograd has finished the gradient of parameter `position`: collect it, and reduce what is complete and next."""
        unit.arrive(position)
        if self.due:
            self._watch()
        while self.due and self.due[0].gradients.complete:
            self._reduce_next()

    def _watch(self) -> None:
        if not self.watching:
            self.watching = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)

    def _end_of_backward(self) -> None:
        """What stage 3 still holds is released, and what the pass left incomplete is reduced now, at the same point on every
        rank."""
        self.watching = False
        self._release()
        self._flush()

    def _release(self) -> None:
        for unit in self.units:
            if unit.releases:
                unit.drop()

    def _prefetch(self, index: int) -> None:
        if index < len(self.units):
            self.units[index].gather()

    def _flush(self) -> None:
        while self.due:
            self._reduce_next()

    def _reduce_next(self) -> None:
        if len(self.in_flight) == self.max_in_flight:
            self.in_flight.popleft().gradients.finish()
        self.in_flight.append(self.due.popleft())
        self.in_flight[-1].gradients.start(self.last)


def _inside_backward() -> bool:
    """Whether this is a forward pass that activation checkpointing repeats inside the backward pass."""
    return torch._C._current_graph_task_id() != -1
