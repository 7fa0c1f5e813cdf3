"""The ranks as a mesh, and their groups by purpose. Nobody else needs the names of its axes.

    rows      ranks that read different rows of a step's batch; its weight and its token counts are summed over them
    shards    ranks over which ZeRO shards a unit of some family, and over which that unit's gradients are summed
    replicas  ranks that hold the same shards of such a unit; its gradients are summed over them, too
    pipeline  ranks that hold the successive stages of one model
    tensor    ranks that hold the slices of one stage's parameters
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from neox_native.config.schema import Parallel

AXES = ("pp", "dp", "tp")
"""Outermost first: tp is innermost, so that a tensor-parallel group stays inside a node."""
REPLICAS, SHARDS = "dp_replicate", "dp_shard"
"""The two parts of dp where ZeRO shards inside groups of it. The shards are neighbours, which stay inside a node."""


@dataclass(frozen=True)
class Axis:
    """The ranks that differ from this one in one respect, in their order."""

    mesh: DeviceMesh
    """A mesh of one dim, as DTensors want it."""

    @property
    def name(self) -> str:
        """What people call it: "dp"."""
        return (self.mesh.mesh_dim_names or ("",))[0]

    @cached_property
    def group(self) -> dist.ProcessGroup:
        """Their process group."""
        return self.mesh.get_group()

    @cached_property
    def peers(self) -> dist.ProcessGroup | None:
        """Their process group, or None where this rank is alone and nothing is to be communicated."""
        return self.group if self.size > 1 else None

    @cached_property
    def rank(self) -> int:
        """This rank's place among them."""
        return self.mesh.get_local_rank()

    @cached_property
    def size(self) -> int:
        """How many they are."""
        return self.mesh.size()


class Mesh:
    """All ranks, and this rank's groups among them. Creating one is a collective.

    Args:
        whole: the axes `AXES`.
        shard_size: neighbours on dp among which ZeRO shards; 0 takes all of dp.
    """

    def __init__(self, whole: DeviceMesh, shard_size: int = 0) -> None:
        assert whole.mesh_dim_names == AXES, whole.mesh_dim_names
        self.whole, self.shard_size = whole, shard_size
        self.named = {name: Axis(whole[name]) for name in AXES}
        """Every axis by name, and the parts of dp: for people, the start-up check, the dry run's account."""
        if shard_size:
            ranks = whole.mesh.unflatten(1, (-1, shard_size))  # [pp, replicas, shards, tp]
            self.named |= {name: self._part(name, ranks.movedim(dim, -1)) for dim, name in enumerate((REPLICAS, SHARDS), start=1)}

    def _part(self, name: str, ranks: Tensor) -> Axis:
        """The axis of this rank's group among those that lie along the last dim. A collective."""
        groups = ranks.flatten(0, -2).tolist()
        if getattr(dist.group.WORLD, "bound_device_id", None) is None:
            mine, _ = dist.new_subgroups_by_enumeration(groups)
        else:  # as torch makes a mesh's own groups of NCCL: they inherit its options
            mine = dist.split_group(split_ranks=groups)
        return Axis(DeviceMesh.from_group(mine, self.whole.device_type, mesh_dim_names=(name,)))

    @property
    def rows(self) -> Axis:
        """The ranks that read different rows."""
        return self.named["dp"]

    @property
    def loss_shares(self) -> tuple[Axis, ...]:
        """The axes over which shares of a step's loss are summed: other ranks read other rows, and only a last stage has any."""
        return self.rows, self.pipeline

    @property
    def pipeline(self) -> Axis:
        """The ranks that hold the stages of one model."""
        return self.named["pp"]

    @property
    def tensor(self) -> Axis:
        """The ranks that hold slices of the same parameters."""
        return self.named["tp"]

    def shards(self, family: str = "dense") -> Axis:
        """The ranks over which ZeRO shards units of a family ("dense" or "expert", see `model.parameters.Card`)."""
        return self.named[SHARDS if self.shard_size else "dp"]

    def replicas(self, family: str = "dense") -> Axis | None:
        """The ranks that hold the same shards of such units; None where ZeRO shards over all of dp."""
        return self.named.get(REPLICAS)

    def state_mesh(self, family: str = "dense") -> DeviceMesh:
        """This stage's ranks as ("tp", "dp"): a parameter of the family is first cut by tp, then each slice by `shards`, which
        come last; where there are `replicas`, they are the dim between the two.

        It uses the groups that exist.
        """
        replicas = self.replicas(family)
        axes = [self.tensor, *([replicas] if replicas else []), self.shards(family)]
        ranks = self.whole.mesh[self.pipeline.rank].T.reshape([axis.size for axis in axes])
        names = tuple(axis.name for axis in axes)
        return DeviceMesh.from_group([axis.group for axis in axes], self.whole.device_type, mesh=ranks, mesh_dim_names=names)

    def across_stages(self, places: Sequence[int]) -> dist.ProcessGroup | None:
        """A group of the ranks that stand at `places` of the pipeline and are alike in all else; None for a rank elsewhere.
        A collective."""
        mine, _ = dist.new_subgroups_by_enumeration(self.whole.mesh[list(places)].flatten(1).T.tolist())
        return mine

    def tensor_neighbours(self, count: int) -> dist.ProcessGroup:
        """A group of this rank among each `count` neighbours on the tensor axis. A collective."""
        if count == self.tensor.size:
            return self.tensor.group
        mine, _ = dist.new_subgroups_by_enumeration(self.whole.mesh.reshape(-1, count).tolist())
        return mine

    @property
    def place(self) -> dict[str, int]:
        """This rank's place on each axis, by name."""
        return {name: self.named[name].rank for name in AXES}

    @property
    def layout(self) -> str:
        """The sizes of all axes, for people: "pp 2 x dp 2 x tp 2"."""
        groups = f" in groups of {self.shard_size}" if self.shard_size else ""
        return " x ".join(f"{name} {self.named[name].size}{groups if name == 'dp' else ''}" for name in AXES)

    @property
    def first_of_last_stage(self) -> int:
        """The first of the ranks that have a model's output."""
        return int(self.whole.mesh[-1].flatten()[0])


def build_mesh(parallel: Parallel, device: torch.device) -> Mesh:
    """The mesh of the job's ranks. `parallel.dp` must be resolved: pp * dp * tp = number of ranks."""
    whole = init_device_mesh(device.type, (parallel.pp, parallel.dp, parallel.tp), mesh_dim_names=AXES)
    return Mesh(whole, parallel.zero_shard_size)
