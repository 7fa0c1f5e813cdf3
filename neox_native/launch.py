"""What the launcher told this process, how it meets the other ranks, and what the ranks do as a whole.

No other file reads the launcher's environment variables.

[Note: failing together] A rank that meets a full disk must not leave its peers waiting in a collective. So all local work
that can fail runs inside `Ranks.together`. It ends with a collective: either all ranks go on, or all raise the same sentence.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from neox_native.errors import UserError, in_words


MEETING = timedelta(minutes=3)
"""How long ranks wait for each other when they start."""


@dataclass(frozen=True)
class Launch:
    """What the launcher (torchrun) told this process; a plain `python train.py` is rank 0 of 1."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int = 1
    """Processes on this machine."""
    restarts: int = 0
    """How often torchrun has restarted this process, or Slurm its job. Nodes count for themselves: the numbers may differ."""
    job: str = ""
    """The launcher's name of this job, which restarts do not change; "" or "none" where it has none."""
    node: int = 0
    """Number of this process's node among those of this start."""
    launcher: str = ""
    """A name that this node's torchrun has to itself and keeps when it restarts its ranks; "" where it has none."""
    restarts_left: int = 0
    """How often torchrun would still restart this process after a failure."""

    @classmethod
    def from_environment(cls) -> Launch:
        """Read what torchrun sets."""
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")  # LAUNCHER/attempt_N/RANK/error.json
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            restarts=sum(int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")),
            job=os.environ.get("TORCHELASTIC_RUN_ID", ""),
            node=int(os.environ.get("GROUP_RANK", 0)),
            launcher=Path(error_file).parents[2].name if error_file.count(os.sep) > 3 else "",
            restarts_left=int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
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


def start_process_group(
    device: torch.device, launch: Launch, store: dist.Store | None = None, timeout: timedelta = dist.default_pg_timeout
) -> None:
    """Join the other ranks: NCCL for GPU tensors, gloo for CPU tensors. A lone process needs no launcher.

    Args:
        store: where the ranks meet; None for the launcher's.
        timeout: of every collective.
    """
    backend, options = "gloo", None
    if device.type == "cuda":
        # Small kernels of a collective must not wait behind all the blocks of a large product. Groups that are split off this one
        # inherit its options.
        backend, options = "cpu:gloo,cuda:nccl", dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timeout
    if store is None and launch.world_size == 1 and "MASTER_ADDR" not in os.environ:
        store = dist.HashStore()
    elif store is None:
        store = fresh_store(launchers_store(launch), launch)
    # `device_id` is load-bearing. With it NCCL puts all messages of a pipeline on the group's one communicator, in the order
    # in which each rank issues them, and `tests/parallel/test_messages.py` shows that no schedule can hang there. Without it
    # every pair of ranks gets a communicator of its own at its first message, which both must make at once, whatever each of
    # them has to do first: interleaved schedules may hang.
    dist.init_process_group(
        backend,
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
        pg_options=options,
        device_id=device if device.type == "cuda" else None,
    )


def launchers_store(launch: Launch, timeout: timedelta = MEETING) -> dist.Store:
    """The launcher's key-value store. A torchrun that shares its store with the ranks gives them the address of one that is
    gone, where it was another node's and that node has left (torch 2.13).

    Raises:
        UserError: it does not answer within `timeout`.
    """
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistError:
        raise UserError(
            f"Rank {launch.rank} of {launch.world_size} did not meet the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {timeout.total_seconds():.0f} seconds; look at that node, and where nodes come "
            "and go (--nnodes MIN:MAX), start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1."
        ) from None
    store.set_timeout(dist.default_pg_timeout)
    return store


def fresh_store(store: dist.Store, launch: Launch, timeout: timedelta = MEETING) -> dist.Store:
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


@dataclass(frozen=True)
class _Failure:
    rank: int
    host: str
    kind: str
    message: str
    of_the_user: bool


class Ranks:
    """All ranks of the job, with a gloo group of their own, or this process alone.

    Creating one is a collective. With a group of its own, a background thread can save while the main thread's collectives
    go on, and objects stay off the GPU. The object collectives unpickle what the *ranks of this job* send, never a file.

    Args:
        tell: takes what rank 0 says to people.
    """

    def __init__(self, tell: Callable[[str], None] = partial(print, flush=True)) -> None:
        self._tell = tell
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Tell people something, once for all ranks. Not a collective."""
        if self.is_first:
            self._tell(text)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, by rank, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Run the body on every rank, then agree on how it went. A collective ends it, whatever happened.

        Where one body raises, every rank raises. What the user can mend (a `UserError`, a full disk, a missing permission)
        becomes a `UserError` with the same sentence everywhere. For a bug, the failing rank raises its own error and the
        others a `RuntimeError`.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failures = [failure for failure in self.gather(self._describe(error)) if failure is not None]
        if not failures:
            return
        first = failures[0]
        others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        where = f"{doing} failed" + (f" on rank {first.rank}{others}, host {first.host}" if self.size > 1 else "")
        if all(failure.of_the_user for failure in failures):
            raise UserError(f"{where}: {first.message}") from error
        if error is not None:
            raise error
        raise RuntimeError(f"{where}: {first.kind}: {first.message}")

    def _describe(self, error: Exception | None) -> _Failure | None:
        if error is None:
            return None
        message = in_words(error) if isinstance(error, OSError) else str(error)
        of_the_user = isinstance(error, (UserError, OSError))
        return _Failure(self.rank, socket.gethostname(), type(error).__name__, message, of_the_user)
