"""One unit: the parameters that its modules read, and this rank's fp32 masters. `gradients.py` has its gradients.

[Note: master weights] The optimizer updates fp32 *master* shards, drawn from the fp32 initialisation and never from
rounded parameters. Between an update and the next use, parameters are *stale*; gathering them copies everybody's
masters, rounded to the parameters' type, into them. fp32 parameters are their own masters, and so are frozen ones of
any type, for nothing updates them: their shard is a view of what modules read, or of this rank's row of it.

Each parameter has a flat storage of W full chunks, so that gathered rows copy into it without a special case for short
chunks. The storage has a version counter apart from the parameter's: to autograd, a refill is no change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from enum import Flag, auto
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from neox_native.fixed_point import FixedGradients
from neox_native.zero import collectives
from neox_native.zero.gradients import GradientSum
from neox_native.zero.layout import Layout, ZeroStage, lay_out, local_view
from neox_native.zero.spec import ParameterSpec, Unit, give_storage, local

Draw = Callable[[ParameterSpec], Tensor]
"""Initial value of a parameter's tp-local shard, in fp32."""


class State(Flag):
    """Where a unit's parameters are, and the memory that this takes beyond what it keeps between steps. P is their size."""

    RESTING = 0
    """Nothing more. The parameters of stages 1 and 2 are stale; those of stage 3 have no memory."""
    GATHERING = auto()
    """The all-gather of its parameters is under way: P, its output."""
    PRESENT = auto()
    """Modules can read its parameters: P in stage 3, elsewhere nothing more."""


class Gathering(NamedTuple):
    """An all-gather under way."""

    work: collectives.Handle
    matrix: Tensor | None
    """Where the rows arrive [W, S]; None if they arrive in the parameters."""
    layout: Layout


class ShardedUnit:
    """One unit's memory and its state. See [Note: rows and units] and [Note: master weights].

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
        self.dtype, self.device = dtype, device
        size = dist.get_world_size(unit.group)
        self.zero_stage = zero_stage if size > 1 else ZeroStage.NONE
        self.rank, world = (dist.get_rank(unit.group), size) if self.zero_stage else (0, 1)
        assert unit.replicas is None or zero_stage, "stage 0 has one group, whose ranks are all replicas"
        # Replicas hold the same shards: in stage 0 all ranks of the group do, from stage 1 on those of `unit.replicas`.
        alike = unit.replicas if self.zero_stage or unit.replicas else unit.group
        self.num_replicas = 1 if alike is None else dist.get_world_size(alike)
        self.replicas = alike if self.num_replicas > 1 else None
        """The ranks that hold the same shards, where there are others."""
        trained = [spec for spec in unit.specs if spec.parameter.requires_grad]
        self.specs = trained + [spec for spec in unit.specs if not spec.parameter.requires_grad]
        self.layout = lay_out([spec.local_shape for spec in self.specs], world)
        self.trained_layout = lay_out([spec.local_shape for spec in trained], world)
        self.has_frozen = len(trained) < len(self.specs)
        self.releases = self.zero_stage == ZeroStage.PARAMETERS
        """Whether full parameters exist only while they are in use."""
        self.differentiates_values = unit.differentiates_values
        self.state = State.RESTING if self.releases else State.PRESENT
        self.waiting: collectives.Waiting = nullcontext
        self._hold_parameters()
        self.gradients = GradientSum(
            trained, self.trained_layout, unit.group, self.replicas, self.zero_stage <= ZeroStage.OPTIMIZER, device, fixed
        )

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
            parameters = [local(spec.parameter).data for spec in self.specs[: len(self.trained_layout.slots)]]
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
        if collectives.pairwise(self.group):
            self._hold_storages()
            chunks = [storage.view(layout.world, -1) for storage in self.storages[: len(layout.slots)]]
            if (copied := self.master if self.row is None else self.row) is not None:  # else my shard is a view of my chunk
                mine = [copied[slot.offset : slot.offset + slot.width] for slot in layout.slots if slot.offset < len(copied)]
                torch._foreach_copy_([chunk[self.rank] for chunk in chunks[: len(mine)]], mine)
            self.gathering = Gathering(collectives.exchange_chunks(chunks, self.group), None, layout)
            return
        matrix = torch.empty(layout.world, layout.size, dtype=self.dtype, device=self.device)
        row = matrix[self.rank] if self.row is None else self.row
        if self.row is None:
            num_copied = 0 if self.master is None else len(self.trained_layout.slots)
            if self.master is not None:
                row[: len(self.master)].copy_(self.master)
            if views := [local_view(row, slot, self.rank) for slot in layout.slots[num_copied:]]:
                torch._foreach_copy_(views, self.shards[num_copied : len(layout.slots)])
        self.gathering = Gathering(collectives.all_gather(matrix.view(-1), row, self.group), matrix, layout)

    @torch.no_grad()
    def make_present(self) -> None:
        """Make the compute stream wait for the rows and copy them into the parameters, for what it does next."""
        self.gather()
        if State.GATHERING not in self.state:
            return
        self.state ^= State.GATHERING | State.PRESENT
        if self.gathering is None:
            return
        work, matrix, layout = self.gathering
        self.gathering = None
        with self.waiting():
            work.wait()
        if matrix is not None:
            self._hold_storages()
            unpack(matrix, layout, self.storages)
        self.frozen_stale = self.frozen_stale and layout is not self.layout

    def _hold_storages(self) -> None:
        for storage in self.storages if self.releases else ():
            storage.untyped_storage().resize_(storage.numel() * storage.element_size())

    def drop(self) -> None:
        """Let a gather end whose result nobody wants: copied late, it would overwrite newer shards that are views. In stage
        3, release the parameters."""
        if State.GATHERING in self.state:
            if self.gathering is not None:
                self.gathering.work.wait()
                self.gathering = None
        if self.releases:
            for storage in self.storages:
                storage.untyped_storage().resize_(0)
            self.state &= ~State.PRESENT
        self.state &= ~State.GATHERING

    def arrive(self, position: int) -> None:
        """Autograd has finished a gradient of one parameter. If it was the last, every node of the backward pass that reads the
        parameter has run: stage 3 releases it, before the gradient asks for memory."""
        if self.gradients.arrive(position) and self.releases:
            self.storages[position].untyped_storage().resize_(0)
            if self.gradients.complete and not self.has_frozen:
                self.drop()
        self.gradients.take(position)


def unpack(matrix: Tensor, layout: Layout, storages: Sequence[Tensor]) -> None:
    """Copy the slots of a matrix [W, S] into flat storages [W * width], all at once: on a GPU it is one kernel, for a matrix
    without gaps. So what pads the rows is copied, too."""
    starts = [slot.offset for slot in layout.slots[1:]] + [layout.size]
    sizes, chunks = [], []
    for slot, storage, start in zip(layout.slots, storages, starts):
        sizes.append(slot.width)
        chunks.append(storage.view(layout.world, slot.width))
        if padding := start - slot.offset - slot.width:
            sizes.append(padding)
            chunks.append(matrix.new_empty(layout.world, padding))
    torch.split_with_sizes_copy(matrix, sizes, dim=1, out=chunks)
