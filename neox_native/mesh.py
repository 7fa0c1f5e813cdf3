"""Ranks as a mesh."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from neox_native.config.schema import Parallel

AXES = ("pp", "dp", "tp")


def build_mesh(parallel: Parallel, device: torch.device) -> DeviceMesh:
    """The mesh ("pp", "dp", "tp"), tp innermost so that a tensor-parallel group stays inside a node.

    `parallel.dp` must be resolved: pp * dp * tp = number of ranks.
    """
    return init_device_mesh(device.type, (parallel.pp, parallel.dp, parallel.tp), mesh_dim_names=AXES)
