"""One unit: the parameters that its modules read, this rank's fp32 masters, and the matrix of gradients.

[Note: master weights] The optimizer updates fp32 *master* shards, drawn from the fp32 initialisation and never from
rounded parameters. Between an update and the next use, parameters are *stale*; gathering them copies everybody's
masters, rounded to the parameters' type, into them. fp32 parameters are their own masters, and so are frozen ones of
any type, for nothing updates them: their shard is a view of what modules read, or of this rank's row of it.

Each parameter has a flat storage of W full chunks, so that gathered rows copy into it without a special case for short
chunks. The storage has a version counter apart from the parameter's: to autograd, a refill is no change.

[Note: accumulation] As soon as autograd has finished a parameter's gradient, a hook copies it into the unit's fp32
matrix (the first microbatch) or adds it (the others) and drops it: the copy-in that the collective needs is the fp32
accumulation that low precision needs. Stages 0 and 1 keep the matrix and reduce it once, in the last backward pass of
the step; the result lies in my own row. Stages 2 and 3 reduce in every backward pass into a row of their own and free
the matrix. Stage 0 is the same with one row, the whole parameter, and an all-reduce.

With `FixedGradients` the matrix holds integers, whose sum no order changes, until `settle` turns this rank's row into fp32.

Gradients are summed, never averaged: the loss is already divided by the tokens of the whole step. After a step the rows
hold the gradient that was applied, until the next training forward makes use of their memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from enum import Flag, auto
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from neox_native.fixed_point import FixedGradients
from neox_native.zero import collectives
from neox_native.zero.layout import Layout, Slot, ZeroStage, lay_out
from neox_native.zero.spec import ParameterSpec, Unit, give_storage, local, local_gradient

Draw = Callable[[ParameterSpec], Tensor]
"""Initial value of a parameter's tp-local shard, in fp32."""


class State(Flag):
    """What a unit is doing, and the memory that it then has beyond what it keeps between steps; costs add up.

    P is the size of its parameters in their type, G the size of their gradients in fp32.
    """

    RESTING = 0
    """Nothing more. The parameters of stages 1 and 2 are stale; those of stage 3 have no memory."""
    GATHERING = auto()
    """The all-gather of its parameters is under way: P, its output."""
    PRESENT = auto()
    """Modules can read its parameters: P in stage 3, elsewhere nothing more."""
    FILLING = auto()
    """Its matrix collects gradients: G in stages 2 and 3, elsewhere nothing more."""
    REDUCING = auto()
    """The sum of all ranks' matrices is under way: as FILLING."""


class Gathering(NamedTuple):
    """An all-gather under way."""

    work: collectives.Handle
    matrix: Tensor
    row: Tensor
    """Mine, which may be part of the matrix."""
    layout: Layout


class ShardedUnit:
    """One unit's memory and its state. See [Note: rows and units], [Note: master weights] and [Note: accumulation].

    Args:
        unit: trainable parameters are put first, so that frozen ones stay out of the traffic.
        zero_stage: what to shard over the unit's group. A group of one rank has nothing to shard: every stage is stage 0.
        dtype: type of the parameters.
        device: where everything lives.
        fixed: adds gradients up as integers; without it they are added in fp32.
    """

    def __init__(
        self, unit: Unit, zero_stage: ZeroStage, dtype: torch.dtype, device: torch.device, fixed: FixedGradients | None = None
    ):
        self.modules, self.group, self.state_mesh = unit.modules, unit.group, unit.state_mesh
        self.dtype, self.device, self.fixed = dtype, device, fixed
        self.sum_dtype = torch.float32 if fixed is None else torch.int64
        size = dist.get_world_size(unit.group)
        self.zero_stage = zero_stage if size > 1 else ZeroStage.NONE
        self.rank, world = (dist.get_rank(unit.group), size) if self.zero_stage else (0, 1)
        self.num_replicas = 1 if self.zero_stage else size
        """Ranks of the group that hold the same shards."""
        trained = [spec for spec in unit.specs if spec.parameter.requires_grad]
        self.specs = trained + [spec for spec in unit.specs if not spec.parameter.requires_grad]
        self.layout = lay_out([spec.local_shape for spec in self.specs], world)
        self.trained_layout = lay_out([spec.local_shape for spec in trained], world)
        self.has_frozen = len(trained) < len(self.specs)
        self.releases = self.zero_stage == ZeroStage.PARAMETERS
        """Whether full parameters exist only while they are in use."""
        self.keeps_matrix = self.zero_stage <= ZeroStage.OPTIMIZER
        """Whether gradients of a whole step are collected before they are reduced; else those of each backward pass."""
        self.state = State.RESTING if self.releases else State.PRESENT
        self.waiting: collectives.Waiting = nullcontext
        self._hold_parameters()
        self._hold_gradients()

    def _hold_parameters(self) -> None:
        has_master = self.dtype != torch.float32 and self.trained_layout.size
        self.master = torch.zeros(self.trained_layout.size, device=self.device) if has_master else None
        """This rank's fp32 weights, where trained parameters are not their own masters."""
        self.row = torch.zeros(self.layout.size, dtype=self.dtype, device=self.device) if self.releases else None
        """Stage 3: this rank's part of the parameters, in their type."""
        self.storages: list[Tensor] = []
        """Flat storage of each parameter; no elements while a stage-3 unit is released."""
        self.shards: list[Tensor] = []
        """What this rank alone owns of each parameter: fp32 if it is trained, else of the parameters' type."""
        self.gathering: Gathering | None = None
        self.frozen_stale = False
        """Whether frozen parameters, too, must be gathered before they are read: they were loaded."""

    def _hold_gradients(self) -> None:
        self.places: list[list[Tensor]] = []
        """Where each parameter's gradient goes in the matrix, part after part."""
        self.matrix: Tensor | None = self._new_matrix() if self.keeps_matrix else None
        size, slots = self.trained_layout.size, self.trained_layout.slots
        apart = self.matrix is None
        self.sum_row = torch.zeros(size, dtype=self.sum_dtype, device=self.device) if apart else self.matrix[self.rank]
        self.sums = [local_view(self.sum_row, slot, self.rank) for slot in slots]
        """This rank's shard of each trainable parameter's gradient while it is summed."""
        row = self.sum_row if self.fixed is None else self.sum_row.view(torch.float32)[:size]
        self.gradients = [local_view(row, slot, self.rank) for slot in slots]
        """The same in fp32, once it is settled."""
        self.filled: set[int] = set()
        """Parameters that have contributed to the matrix."""
        self.missing: Counter[int] = Counter()
        """For each parameter, how many of its gradients the current backward pass has yet to deliver: one for each reader."""
        self.reduction: collectives.Handle | None = None
        self.num_reductions = 0
        """Reductions in this step."""

    @torch.no_grad()
    def materialize(self, draw: Draw) -> None:
        """Give the parameters and masters storage and their first values, one parameter at a time."""
        for spec, slot in zip(self.specs, self.layout.slots):
            value = draw(spec)
            fits = tuple(value.shape) == slot.shape and value.dtype == torch.float32
            assert fits, (spec.name, value.shape, value.dtype, slot.shape)
            storage = torch.zeros(self.layout.world * slot.width, dtype=self.dtype, device=self.device)
            storage[: slot.num_elements].copy_(value.reshape(-1))
            for parameter in spec.parameters:
                give_storage(parameter, storage.data[: slot.num_elements].view(slot.shape))
            start, stop = slot.span(self.rank)
            if self.master is not None and spec.parameter.requires_grad:
                shard = local_view(self.master, slot, self.rank)
            elif self.row is not None:
                shard = local_view(self.row, slot, self.rank)
            else:
                shard = storage.data[start * slot.inner : stop * slot.inner].view(stop - start, *slot.shape[1:])
            shard.copy_(value[start:stop])
            self.shards.append(shard)
            self.storages.append(storage)
            if self.releases:
                storage.untyped_storage().resize_(0)
        if self.row is not None and self.master is not None:
            self.row[: len(self.master)].copy_(self.master)

    @torch.no_grad()
    def expire(self, frozen_too: bool = False) -> None:
        """The shards have changed: copy them to where they are read, or mark it stale where other ranks' shards are needed
        as well. An update changes trained parameters alone, a load frozen ones, too."""
        if self.zero_stage:
            self.drop()
            self.state &= ~State.PRESENT
            self.frozen_stale |= frozen_too
        if self.master is not None and self.row is not None:
            self.row[: len(self.master)].copy_(self.master)
        elif self.master is not None and not self.zero_stage:
            parameters = [local(spec.parameter).data for spec in self.specs[: len(self.gradients)]]
            torch._foreach_copy_(parameters, self.shards[: len(parameters)])

    @torch.no_grad()
    def gather(self) -> None:
        """Start the all-gather of the unit's row, unless parameters are present or on their way."""
        if self.state & (State.GATHERING | State.PRESENT):
            return
        self.state |= State.GATHERING
        layout = self.layout if self.frozen_stale or self.releases else self.trained_layout
        if not layout.size:
            return
        matrix = torch.empty(layout.world * layout.size, dtype=self.dtype, device=self.device)
        row = matrix[self.rank * layout.size : (self.rank + 1) * layout.size]
        if self.row is not None:
            row = self.row
        else:
            num_copied = 0 if self.master is None else len(self.gradients)
            if self.master is not None:
                row[: len(self.master)].copy_(self.master)
            if views := [local_view(row, slot, self.rank) for slot in layout.slots[num_copied:]]:
                torch._foreach_copy_(views, self.shards[num_copied : len(layout.slots)])
        self.gathering = Gathering(collectives.all_gather(matrix, row, self.group), matrix, row, layout)

    @torch.no_grad()
    def make_present(self) -> None:
        """Make the compute stream wait for the rows and copy them into the parameters, for what it does next."""
        self.gather()
        if State.GATHERING not in self.state:
            return
        self.state ^= State.GATHERING | State.PRESENT
        if self.gathering is None:
            return
        work, flat, row, layout = self.gathering
        self.gathering = None
        with self.waiting():
            work.wait()
        matrix = flat.view(layout.world, layout.size)
        for slot, storage in zip(layout.slots, self.storages):
            if self.releases:
                storage.untyped_storage().resize_(storage.numel() * storage.element_size())
            place = slice(slot.offset, slot.offset + slot.width)
            chunks, rows = storage.view(layout.world, slot.width), matrix[:, place]
            chunks[: self.rank].copy_(rows[: self.rank])
            chunks[self.rank + 1 :].copy_(rows[self.rank + 1 :])
            if self.master is not None or self.releases:  # otherwise my shard is a view of my chunk
                chunks[self.rank].copy_(row[place])
        self.frozen_stale = self.frozen_stale and layout is not self.layout

    def drop(self) -> None:
        """Let a gather end whose result nobody wants: copied late, it would overwrite newer shards that are views. In stage
        3, release the parameters."""
        if State.GATHERING in self.state:
            if self.gathering is not None:
                self.gathering.work.wait()
                self.gathering = None
            self.state ^= State.GATHERING
        elif State.PRESENT in self.state and self.releases:
            for storage in self.storages:
                storage.untyped_storage().resize_(0)
            self.state ^= State.PRESENT

    def begin(self) -> None:
        """A backward pass begins."""
        self.missing = Counter({position: len(self.specs[position].parameters) for position in range(len(self.gradients))})

    @property
    def complete(self) -> bool:
        """Whether the current backward pass has delivered every gradient."""
        return not self.missing.total()

    def arrive(self, position: int) -> None:
        """Autograd has finished a gradient of one parameter. If it was the last, every node of the backward pass that reads the
        parameter has run: stage 3 releases it, before the gradient asks for memory."""
        self.missing[position] -= 1
        if self.releases and not self.missing[position]:
            self.storages[position].untyped_storage().resize_(0)
            if self.complete and not self.has_frozen:
                self.drop()
        self.take(position)

    def take(self, position: int) -> None:
        """Copy or add the whole gradients that lie in a parameter's `.grad`, if there are any, into the matrix."""
        for parameter in self.specs[position].parameters:
            if parameter.grad is not None:
                self._take(position, parameter)

    def _take(self, position: int, parameter: nn.Parameter) -> None:
        self.finish_reduction()  # the matrix is wanted again
        assert self.num_reductions == 0 or not self.keeps_matrix, "the step's reduction has begun"
        if self.matrix is None:
            self.matrix = self._new_matrix()
        self.state |= State.FILLING
        gradient, places = local_gradient(self.specs[position], parameter.grad).flatten(), self.places[position]
        for place, piece in zip(places, gradient.split([place.numel() for place in places])):
            self._put(place, piece.view(place.shape), add=position in self.filled)
        self.filled.add(position)
        parameter.grad = None

    def _put(self, place: Tensor, gradient: Tensor, add: bool) -> None:
        if self.fixed is None:
            (place.add_ if add else place.copy_)(gradient)  # both convert to fp32
        else:
            self.fixed.collect(place, gradient, add)

    def start_reduction(self) -> None:
        """Sum the matrix over the group; parameters that received no gradient count as zero."""
        if self.matrix is None:
            self.matrix = self._new_matrix()
        for position, slot in enumerate(self.trained_layout.slots):
            if position not in self.filled:
                self.matrix[:, slot.offset : slot.offset + slot.width].zero_()
        output = self.sum_row
        if not self.keeps_matrix:
            output.untyped_storage().resize_(output.numel() * output.element_size())
            output = output if self.num_reductions == 0 else self.matrix[self.rank]
        if self.zero_stage:
            self.reduction = collectives.reduce_scatter(output, self.matrix.view(-1), self.group)
        elif self.num_replicas > 1:
            self.reduction = collectives.all_reduce(output, self.group)
        self.num_reductions += 1
        self.state = self.state & ~State.FILLING | State.REDUCING

    def finish_reduction(self) -> None:
        """Make the result visible to the compute stream; in stages 2 and 3 add it to the row and free the matrix."""
        if State.REDUCING not in self.state:
            return
        self.state ^= State.REDUCING
        if self.reduction is not None:
            with self.waiting():
                self.reduction.wait()
            self.reduction = None
        if not self.keeps_matrix:
            assert self.matrix is not None
            if self.num_reductions > 1:
                self.sum_row.add_(self.matrix[self.rank])
            self.matrix, self.places = None, []
        self.filled.clear()

    def forget(self) -> None:
        """A training forward begins. If it is the step's first, stages 2 and 3 free the last step's gradient; its row comes
        back with the first reduction."""
        if not self.keeps_matrix and self.num_reductions == 0:
            self.sum_row.untyped_storage().resize_(0)

    def settle(self) -> None:
        """All sums are complete: `gradients` become valid, and `sums` invalid where they are integers."""
        if self.fixed is not None:
            self.fixed.settle(self.sum_row)

    def _new_matrix(self) -> Tensor:
        layout = self.trained_layout
        matrix = torch.empty(layout.world, layout.size, dtype=self.sum_dtype, device=self.device)
        self.places = [_places(matrix, slot) for slot in layout.slots]
        return matrix


def local_view(row: Tensor, slot: Slot, rank: int) -> Tensor:
    """`rank`'s shard of a parameter, as a view of its row."""
    shape = slot.local_shape(rank)
    return row[slot.offset : slot.offset + shape[0] * slot.inner].view(shape)


def _places(matrix: Tensor, slot: Slot) -> list[Tensor]:
    """A parameter's full chunks as [ranks, width], and the short chunk after them, if there is one, as [1, its width]."""
    num_full = slot.shape[0] // slot.chunk
    places = [matrix[:num_full, slot.offset : slot.offset + slot.width]]
    if rest := slot.shape[0] % slot.chunk:
        places.append(matrix[num_full : num_full + 1, slot.offset : slot.offset + rest * slot.inner])
    return places
