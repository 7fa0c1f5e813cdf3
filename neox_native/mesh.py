"""Ranks as a mesh. The only file that reads the launcher's environment variables."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from datetime import timedelta

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
    restarts: int = 0
    """How often torchrun has restarted this process, or Slurm its job. Nodes count for themselves: the numbers may differ."""
    job: str = ""
    """The launcher's name of this job, which restarts do not change; "" or "none" where it has none."""

    @classmethod
    def from_environment(cls) -> Launch:
        """Read what torchrun sets."""
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            restarts=sum(int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")),
            job=os.environ.get("TORCHELASTIC_RUN_ID", ""),
        )


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
    if launch.world_size == 1 and "MASTER_ADDR" not in os.environ:
        store: dist.Store = dist.HashStore()
    else:
        store, _, _ = next(dist.rendezvous("env://"))
        store = fresh_store(store, launch)
    dist.init_process_group(
        backend,
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        device_id=device if device.type == "cuda" else None,
    )


def fresh_store(store: dist.Store, launch: Launch, timeout: timedelta = timedelta(minutes=3)) -> dist.Store:
    """A part of the launcher's key-value store that no earlier attempt of this job has written to.

    torchrun keeps its store when it restarts the ranks, with the addresses of the dead ones in it, and its restart counts
    differ between nodes. So rank 0 names each attempt anew, and a rank joins the name that answers to the rank itself.

    Raises:
        UserError: a rank does not come within `timeout`; rank 0 names it.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    own = secrets.token_hex(8)
    if launch.rank == 0:
        store.set("attempt", own)
        joined = [f"{own}/{rank}" for rank in range(1, launch.world_size)]
        try:
            store.wait(joined, timeout)
        except dist.DistError:
            missing = [str(rank) for rank, key in enumerate(joined, start=1) if not store.check([key])]
            raise UserError(
                f"Rank {', '.join(missing)} of {launch.world_size} did not start within {timeout.total_seconds():.0f} "
                f"seconds; look at {'its node' if len(missing) == 1 else 'their nodes'}."
            ) from None
        store.set(f"{own}/all", " ".join(store.get(key).decode() for key in joined))
        return dist.PrefixStore(own, store)
    while time.monotonic() < deadline:
        if store.check(["attempt"]):
            attempt = store.get("attempt").decode()
            store.set(f"{attempt}/{launch.rank}", own)
            if store.check([f"{attempt}/all"]) and own in store.get(f"{attempt}/all").decode().split():
                return dist.PrefixStore(attempt, store)
        time.sleep(0.01)
    raise UserError(f"Rank 0 did not answer rank {launch.rank} within {timeout.total_seconds():.0f} seconds; look at its node.")


def build_mesh(parallel: Parallel, device: torch.device) -> DeviceMesh:
    """The mesh ("pp", "dp", "tp"), tp innermost so that a tensor-parallel group stays inside a node.

    `parallel.dp` must be resolved: pp * dp * tp = number of ranks.
    """
    return init_device_mesh(device.type, (parallel.pp, parallel.dp, parallel.tp), mesh_dim_names=AXES)
