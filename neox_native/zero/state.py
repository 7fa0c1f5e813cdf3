"""Shards as DTensors: the form in which master weights and optimizer state meet checkpoints and tests.

[Note: global state] A rank's shard is dim-0 chunk r of its tp-local shard. On a mesh ordered (tp, dp) that is an
ordinary DTensor with placements [placement over tp, Shard(0)]: first cut by tp, then by dp. Its name and its shape are
those of the whole model, so a checkpoint made of such tensors loads into any degrees and any ZeRO stage.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from neox_native.zero.unit import ParameterSpec


def state_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """This pipeline rank's plane of the mesh ("pp", "dp", "tp"), ordered ("tp", "dp"). Uses the groups that exist."""
    assert mesh.mesh_dim_names == ("pp", "dp", "tp"), mesh.mesh_dim_names
    ranks = mesh.mesh[mesh.get_local_rank("pp")].T.contiguous()
    groups = [mesh.get_group("tp"), mesh.get_group("dp")]
    return DeviceMesh.from_group(groups, mesh.device_type, mesh=ranks, mesh_dim_names=("tp", "dp"))


def as_dtensor(spec: ParameterSpec, shard: Tensor, mesh: DeviceMesh, sharded: bool) -> DTensor:
    """The global tensor of which this rank holds `shard`; it shares memory with `shard`.

    Args:
        mesh: see `state_mesh`.
        sharded: whether `shard` is this rank's chunk over dp or the same on all of dp.
    """
    shape = spec.parameter.shape
    return DTensor.from_local(
        shard,
        mesh,
        [spec.placement, Shard(0) if sharded else Replicate()],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def optimizer_state(optimizer: torch.optim.Optimizer, shard: Tensor) -> dict[str, Tensor]:
    """State of one shard by name: tensors of its shape, and scalars, which are the same for all shards."""
    state = optimizer.state[shard]
    for name, value in state.items():
        assert isinstance(value, Tensor) and value.shape in (shard.shape, ()), f"{name} is not elementwise: {value}"
    return dict(state)
