"""Seconds and GB/s of saving and loading, and how long training stands still, beside `torch.save` on one process."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from neox_native.checkpoint import files, store
from neox_native.checkpoint.saver import Saver
from neox_native.config.schema import Checkpoint
from neox_native.launch import Ranks

COLUMNS = 1024


def run(ranks: int = 2, megabytes: int = 768, rounds: int = 9, folder: str | None = None) -> str:
    """Measure in one run, alternating; returns a markdown table of medians over `rounds`.

    Args:
        ranks: gloo ranks on this machine; the state is sharded over them.
        megabytes: size of the state: fp32 weights and two moments, 12 bytes a parameter.
        rounds: repetitions after one that is not counted; a multiple of 3 is fair.
        folder: where to write, in a temporary folder of its own; the disk under it is what is measured.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        arguments = (ranks, megabytes, rounds, Path(name))
        multiprocessing.start_processes(_rank, arguments, nprocs=ranks, start_method="fork")
        measured = [torch.load(Path(name) / f"times{rank}.pt", weights_only=True) for rank in range(ranks)]
    # A save has ended when its slowest rank has; only rank 0 has the one-process rows.
    rows = {what: [max(times) for times in zip(*(m[what] for m in measured if what in m))] for what in measured[0]}
    gigabytes = megabytes / 1000
    lines = [
        f"State of {gigabytes:.2f} GB (weights and two moments in fp32), {ranks} gloo ranks on one machine, "
        f"median of {rounds}; every file flushed to the disk.",
        "",
        "| | seconds | GB/s | training stands still, seconds |",
        "|---|---|---|---|",
    ]
    stalls = {what: what for what in ("torch.save, one process", "save")}
    stalls["save, background"] = "save, background: stall"
    for what, times in rows.items():
        if what.endswith("stall"):
            continue
        seconds = statistics.median(times)
        stall = f"{statistics.median(rows[stalls[what]]):.3f}" if what in stalls else ""
        lines.append(f"| {what} | {seconds:.2f} | {gigabytes / seconds:.2f} | {stall} |")
    share = statistics.median(rows["save, background: stall"]) / statistics.median(rows["save"])
    return "\n".join([*lines, "", f"The background save stops training for {share:.1%} of the time of the other one."])


def _state(megabytes: int, mesh: DeviceMesh | None) -> store.State:
    """Matrices as a model has them, sharded by rows over the mesh, or whole."""
    ranks = 1 if mesh is None else mesh.size()
    layers = max(1, megabytes * 1_000_000 // (3 * 4096 * COLUMNS * 4))
    state: store.State = {}
    for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
        for layer in range(layers):
            name, local = f"{kind}.layers.{layer}.weight", torch.randn(4096 // ranks, COLUMNS)
            state[name] = local if mesh is None else DTensor.from_local(local, mesh, [Shard(0)])
    return state


def _rank(rank: int, ranks: int, megabytes: int, rounds: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    state = _state(megabytes, init_device_mesh("cpu", (ranks,)))
    whole = _state(megabytes, None) if rank == 0 else {}
    foreground, background = Saver(folder / "sync", Checkpoint()), Saver(folder / "async", Checkpoint(async_=True))
    together = Ranks()
    times: dict[str, list[float]] = {}

    def timed(what: str, action: Callable[[], Any], alone: bool = False) -> None:
        os.sync()
        dist.barrier()
        start = time.perf_counter()
        if not alone or rank == 0:
            action()
            times.setdefault(what, []).append(time.perf_counter() - start)

    for step in range(rounds + 1):
        saves = [
            lambda: timed("torch.save, one process", lambda: _torch_save(whole, folder / "plain.pt"), alone=True),
            lambda: timed("save", lambda: foreground.save(step, state, {})),
            lambda: timed("save, background", lambda: (background.save(step, state, {}), background.wait())),
        ]
        # The disk slows down within a round: each comes first in turn.
        for save in saves[step % 3 :] + saves[: step % 3]:
            save()
        times.setdefault("save, background: stall", []).append(background.reports()[0].stall_seconds)
        timed("torch.load, one process", lambda: torch.load(folder / "plain.pt", weights_only=True), alone=True)
        path = files.step_folder(folder / "sync", step)
        timed("load, checksums verified", lambda: store.load(path, state, together))
        timed("load", lambda: store.load(path, state, together, verified=True))
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder / "sync")
            shutil.rmtree(folder / "async")
            (folder / "plain.pt").unlink()  # a file written over is faster than a new one
    torch.save({what: found[1:] for what, found in times.items()}, folder / f"times{rank}.pt")
    dist.destroy_process_group()


def _torch_save(state: store.State, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
