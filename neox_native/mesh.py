"""Ranks as a mesh. The only file that reads the launcher's environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from neox_native.config.schema import Parallel
from neox_native.errors import UserError

AXES = ("pp", "dp", "tp")


@dataclass(frozen=True)
class Launch:
    """What the launcher (torchrun) told this process; a plain `python train.py` is rank 0 of 1."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> Launch:
        """Read RANK, LOCAL_RANK and WORLD_SIZE."""
        read = lambda name, default: int(os.environ.get(name, default))  # noqa: E731
        return cls(read("RANK", 0), read("LOCAL_RANK", 0), read("WORLD_SIZE", 1))


def pick_device(setting: str, launch: Launch) -> torch.device:
    """This process's device for `run.device` = "auto", "cpu" or "cuda".

    Raises:
        UserError: "cuda" where there are fewer GPUs than processes on this machine.
    """
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"run.device = {setting!r} needs a GPU for local rank {launch.local_rank}, but this machine shows "
            f"{torch.cuda.device_count()}; start fewer processes per node or set run.device = 'cpu'."
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


def start_process_group(device: torch.device, launch: Launch) -> None:
    """Join the other ranks: NCCL for GPU tensors, gloo for CPU tensors. A lone process needs no launcher."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = dist.HashStore() if launch.world_size == 1 and "MASTER_ADDR" not in os.environ else None
    rank, world_size = (launch.rank, launch.world_size) if store else (-1, -1)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, device_id=device if device.type == "cuda" else None
    )


def build_mesh(parallel: Parallel, device: torch.device) -> DeviceMesh:
    """The mesh ("pp", "dp", "tp"), tp innermost so that a tensor-parallel group stays inside a node.

    `parallel.dp` must be resolved: pp * dp * tp = number of ranks.
    """
    return init_device_mesh(device.type, (parallel.pp, parallel.dp, parallel.tp), mesh_dim_names=AXES)
