"""Run a function on several gloo ranks, forked from the test's own process.

A fork costs 0.2 s for two ranks where a spawn costs seconds, and `function` may be a closure. The ranks meet through a
file, so no port is taken. The first rank that fails ends the others.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import subprocess
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from neox_native.launch import Launch, pick_device, start_process_group

GRACE_SECONDS = 2.0
"""How long the other ranks may go on after one has failed."""


def children_of(process: subprocess.Popen) -> list[int]:
    """Process ids of what a launcher has started."""
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


class RankError(AssertionError):
    """A rank failed; the message holds its traceback."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 300.0, device: str = "cpu"
) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks with a gloo process group, and with NCCL for a GPU each where `device` is
    "cuda"; return the results in rank order.

    RANK, WORLD_SIZE and LOCAL_RANK are set as torchrun would set them. Results travel by pickle: return plain CPU
    tensors, never DTensors. Raises `RankError` with the traceback of the rank that failed first, and `TimeoutError`.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = (world_size, folder, timeout_seconds, device, function, args)
        processes = [context.Process(target=_rank_main, args=(rank, *arguments)) for rank in range(world_size)]
        with warnings.catch_warnings():
            # Python 3.12 warns of forking beside threads; torch's idle pools hold no lock that a child takes.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            for process in processes:
                process.start()
        try:
            killed = _join(processes, timeout_seconds)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        _raise_first_failure(folder, processes, killed)
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _rank_main(
    rank: int,
    world_size: int,
    folder: Path,
    timeout_seconds: float,
    device: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """The life of one rank. It leaves `RANK.result`, or `RANK.error` with the moment of its failure."""
    torch.set_num_threads(1)  # first of all: a child hangs in the OpenMP pool that only its parent has
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    try:
        launch, timeout = Launch.from_environment(), datetime.timedelta(seconds=timeout_seconds)
        store = dist.FileStore(str(folder / "rendezvous"), world_size)
        store.set_timeout(timeout)
        start_process_group(pick_device(device, launch), launch, store, timeout)  # as training does
        result = pickle.dumps(function(*args))
        (folder / f"{rank}.result").write_bytes(result)
        dist.destroy_process_group()
    except BaseException:
        moment = time.monotonic()  # one clock for all processes of a machine
        (folder / f"{rank}.error").write_bytes(pickle.dumps((moment, traceback.format_exc())))
        os._exit(1)  # destroying the group would wait for ranks that may never come


def _join(processes: list[BaseProcess], timeout_seconds: float) -> list[int]:
    """Wait for all ranks, after a failure only for `GRACE_SECONDS`; return the ranks that a signal ended, in order."""
    deadline = time.monotonic() + timeout_seconds
    alive = {process.sentinel: rank for rank, process in enumerate(processes)}
    killed: list[int] = []
    failed = False
    while alive:
        done = wait(list(alive), timeout=max(0.0, deadline - time.monotonic()))
        if not done and failed:
            break
        if not done:
            raise TimeoutError(f"ranks {sorted(alive.values())} did not finish within {timeout_seconds} seconds")
        for sentinel in done:
            rank = alive.pop(sentinel)
            processes[rank].join()
            status = processes[rank].exitcode or 0
            if status < 0:
                killed.append(rank)
            if status != 0 and not failed:
                failed, deadline = True, time.monotonic() + GRACE_SECONDS
    return killed


def _raise_first_failure(folder: Path, processes: list[BaseProcess], killed: list[int]) -> None:
    """Raise what went wrong first: a rank's own error, else a rank's sudden end, else the first to lose its peer."""
    paths = {rank: folder / f"{rank}.error" for rank in range(len(processes))}
    errors = {rank: pickle.loads(path.read_bytes()) for rank, path in paths.items() if path.exists()}
    own = {rank: error for rank, error in errors.items() if "gloo/transport" not in error[1]}
    if killed and not own:
        raise RankError(f"rank {killed[0]} was ended by signal {-(processes[killed[0]].exitcode or 0)}")
    if errors:
        first, (_, report) = min((own or errors).items(), key=lambda item: item[1][0])
        raise RankError(f"rank {first} failed:\n{report}")
