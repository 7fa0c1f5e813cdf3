"""One unit's weights: the full parameters that the module reads and this rank's fp32 master shards.

[Note: master weights] The optimizer updates fp32 *master* shards, drawn from the fp32 initialisation and never from
rounded parameters. Between an update and the next use, parameters are *stale*; gathering them copies everybody's
masters, rounded to the parameters' type, into them. fp32 parameters that stay whole (stages 0 to 2) are their own
master: the shard is a view.

Each parameter has a flat storage of W full chunks, so that gathered rows copy into it without a special case for short
chunks. The storage has a version counter apart from the parameter's: to autograd, a refill is no change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from neox_native.zero import collectives
from neox_native.zero.bucket import local_view
from neox_native.zero.layout import Layout, ZeroStage, lay_out
from neox_native.zero.unit import ParameterSpec, local

Draw = Callable[[ParameterSpec], Tensor]
"""Initial value of a parameter's tp-local shard, in fp32."""


class Gathering(NamedTuple):
    """An all-gather under way."""

    work: collectives.Handle
    matrix: Tensor
    row: Tensor
    """Mine, which may be part of the matrix."""
    layout: Layout


class UnitWeights:
    """Parameters and masters of one unit; trainable parameters first, so that frozen ones stay out of the traffic."""

    def __init__(
        self,
        specs: Sequence[ParameterSpec],
        group: dist.ProcessGroup,
        stage: ZeroStage,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.group, self.stage, self.dtype, self.device = group, stage, dtype, device
        self.rank, world = (dist.get_rank(group), dist.get_world_size(group)) if stage else (0, 1)
        trained = [spec for spec in specs if spec.parameter.requires_grad]
        self.specs = trained + [spec for spec in specs if not spec.parameter.requires_grad]
        self.has_frozen = len(trained) < len(self.specs)
        self.layout = lay_out([spec.local_shape for spec in self.specs], world)
        self.trained_layout = lay_out([spec.local_shape for spec in trained], world)
        self.shards_parameters = stage == ZeroStage.PARAMETERS
        own_master = dtype == torch.float32 and not self.shards_parameters
        self.master = None if own_master else torch.zeros(self.layout.size, device=device)
        self.row: Tensor | None = None
        """Stage 3: this rank's part of the parameters, in their type."""
        self.storages: list[Tensor] = []
        """Flat storage of each parameter; no elements while a stage-3 unit is released."""
        self.shards: list[Tensor] = []
        """fp32 master shard of each parameter."""
        self.gathering: Gathering | None = None
        self.waiting: collectives.Waiting = nullcontext

    @torch.no_grad()
    def materialize(self, draw: Draw) -> None:
        """Give the parameters and masters storage and their first values, one parameter at a time."""
        for spec, slot in zip(self.specs, self.layout.slots):
            value = draw(spec)
            assert tuple(value.shape) == slot.shape and value.dtype == torch.float32, (
                spec.name,
                value.shape,
                slot.shape,
            )
            storage = torch.zeros(self.layout.world * slot.width, dtype=self.dtype, device=self.device)
            storage[: slot.num_elements].copy_(value.reshape(-1))
            _give_storage(spec.parameter, storage.data[: slot.num_elements].view(slot.shape))
            start, stop = slot.span(self.rank)
            if self.master is None:
                shard = storage.data[start * slot.inner : stop * slot.inner].view(stop - start, *slot.shape[1:])
            else:
                shard = local_view(self.master, slot, self.rank)
                shard.copy_(value[start:stop])
            self.shards.append(shard)
            self.storages.append(storage)
            if self.shards_parameters:
                storage.untyped_storage().resize_(0)
        if self.shards_parameters:
            assert self.master is not None
            self.row = self.master if self.dtype == torch.float32 else self.master.to(self.dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """After an update: bring what this rank derives from its masters alone up to date."""
        if self.stage == ZeroStage.NONE and self.master is not None:
            torch._foreach_copy_([local(spec.parameter).data for spec in self.specs], self.shards)
        if self.row is not None and self.master is not None and self.row is not self.master:
            self.row.copy_(self.master)

    @torch.no_grad()
    def start_gathering(self, frozen_too: bool) -> None:
        """Start the all-gather of the unit's row."""
        layout = self.layout if frozen_too else self.trained_layout
        if not layout.size:
            return
        matrix = torch.empty(layout.world * layout.size, dtype=self.dtype, device=self.device)
        row = matrix[self.rank * layout.size : (self.rank + 1) * layout.size]
        if self.row is not None:
            row = self.row
        elif self.master is not None:
            row.copy_(self.master[: layout.size])
        else:
            views = [local_view(row, slot, self.rank) for slot in layout.slots]
            torch._foreach_copy_(views, self.shards[: len(views)])
        self.gathering = Gathering(collectives.all_gather(matrix, row, self.group), matrix, row, layout)

    @torch.no_grad()
    def finish_gathering(self) -> None:
        """Make the compute stream wait for the rows and copy them into the parameters."""
        if self.gathering is None:
            return
        work, flat, row, layout = self.gathering
        self.gathering = None
        with self.waiting():
            work.wait()
        matrix = flat.view(layout.world, layout.size)
        for slot, storage in zip(layout.slots, self.storages):
            if self.shards_parameters:
                storage.untyped_storage().resize_(storage.numel() * storage.element_size())
            place = slice(slot.offset, slot.offset + slot.width)
            chunks, rows = storage.view(layout.world, slot.width), matrix[:, place]
            chunks[: self.rank].copy_(rows[: self.rank])
            chunks[self.rank + 1 :].copy_(rows[self.rank + 1 :])
            if self.master is not None:  # otherwise my master is a view of my chunk
                chunks[self.rank].copy_(row[place])

    def abandon_gathering(self) -> None:
        """Let a gather end whose result nobody wants: copied late, it would overwrite newer masters that are views."""
        if self.gathering is not None:
            self.gathering.work.wait()
            self.gathering = None

    def release(self, position: int | None = None) -> None:
        """Stage 3: give the memory of the full parameters back, or of one."""
        for storage in self.storages if position is None else [self.storages[position]]:
            storage.untyped_storage().resize_(0)


def _give_storage(parameter: nn.Parameter, value: Tensor) -> None:
    """Replace a parameter's content, from the meta device too, keeping the object that modules and specs refer to."""
    replacement: Tensor = value
    if isinstance(parameter, DTensor):
        replacement = DTensor.from_local(
            value,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    torch.utils.swap_tensors(parameter, nn.Parameter(replacement, requires_grad=parameter.requires_grad))
