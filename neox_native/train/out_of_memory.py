"""Memory that runs out ends a run with what the plan predicted, what was allocated, and settings that would make it fit."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from neox_native.config.schema import Config
from neox_native.errors import UserError
from neox_native.launch import Launch
from neox_native.metrics.memory import FOLDER, Recorder, Usage, usage_of
from neox_native.metrics.throughput import device_name
from neox_native.metrics.writers import write_last_event
from neox_native.plan.memory import memory, peak_bytes
from neox_native.plan.remedies import remedies
from neox_native.plan.search import MEMORY_SHARE
from neox_native.plan.shares import states_costs
from neox_native.reliability.watchdog import Watchdog
from neox_native.units import counted, size

BEGINNINGS = re.compile(
    r"\[enforce fail at alloc_cpu|CUDA error: (out of memory|CUBLAS_STATUS_ALLOC_FAILED)|NCCL error[\s\S]*'out of memory'"
)
"""Of the messages of other errors than torch's own that mean the same: of a CPU's allocator and of CUDA's libraries."""
TRIED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMG]iB)", re.IGNORECASE)


@contextmanager
def out_of_memory_explained(config: Config, device: torch.device, watchdog: Watchdog) -> Iterator[None]:
    """Run the body. Where it runs out of memory on a rank, all ranks end with one sentence, the first such rank's.

    Raises:
        UserError: `explanation`, on all ranks that raise at all; those that wait are their watchdogs' to end.
    """
    launch, folder = Launch.from_environment(), Path(config.run.dir)
    path = folder / FOLDER / f"rank_{watchdog.rank}.pickle"
    recorder = Recorder(device, path, config.run.memory_history, launch.local_world_size)
    try:
        yield
    except Exception as error:
        if (found := out_of_memory(error)) is not None:
            usage, name = recorder.usage or usage_of(device, launch.local_world_size), device_name(device)
            where = f"rank {watchdog.rank} (host {socket.gethostname()}, {name}) ran out of memory in {watchdog.where()}"
            lines = [f"{where}{wanted(found)}.", *explanation(config, watchdog.rank, usage, recorder.requested, name)]
            if recorder.written:
                lines.append(f"what held the memory: {path}, for pytorch.org/memory_viz; run.memory_history = true adds stacks.")
            told = watchdog.tell("\n".join(lines))
        elif not (told := watchdog.told()):
            raise
        if watchdog.rank == 0:
            write_last_event(folder, "out of memory", watchdog.step, told)
        raise UserError(told) from error


def out_of_memory(error: BaseException) -> BaseException | None:
    """The error in a chain of errors that says that memory has run out: a pipeline wraps those of its stages."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return error
        if isinstance(error, RuntimeError) and BEGINNINGS.match(str(error)):
            return error
        error = error.__cause__ or error.__context__
    return None


def wanted(error: BaseException) -> str:
    """How much was asked for, as the error tells."""
    found = TRIED.search(str(error))
    if not found:
        return ""
    return f", which asked for {size(float(found[1])) if found[2] == 'bytes' else f'{found[1]} {found[2]}'} more"


def explanation(config: Config, rank: int, usage: Usage, requested: int, device: str) -> list[str]:
    """Lines about a rank's memory: what was held, what was predicted, what would help.

    A run fits that needs `MEMORY_SHARE` of what there is, as in a search of layouts. Where a GPU's rank held more than was
    predicted, the same is assumed of the changed run. And in any case it must need that much less than this one.

    Args:
        requested: bytes that could not be had.
        device: its name.
    """
    on_gpu = device != "cpu"
    held = f"  allocated   {size(usage.allocated)} by {'tensors' if on_gpu else 'the process, at its peak'}"
    if on_gpu:
        held += f", {size(usage.reserved - usage.allocated)} kept free by torch's allocator"
        held += f", {size(usage.others)} by the driver and others"
    lines = [f"{held}; there are {size(usage.total)}"]
    if not states_costs(config.model):
        return [*lines, "  nothing is predicted, for a layer kind of model.pattern does not state its costs."]
    parallel = config.parallel
    by_kind = memory(config, rank // (parallel.dp * parallel.tp))
    predicted = sum(by_kind.values())
    kinds = ", ".join(f"{kind.replace('_', ' ')} {size(number)}" for kind, number in by_kind.items())
    lines.append(f"  predicted   {size(predicted)} for this rank: {kinds}")
    excess = max(1.0, (usage.allocated + requested) / predicted) if on_gpu else 1.0
    busiest = peak_bytes(config)
    limit = MEMORY_SHARE * min(usage.available / excess, busiest)
    found, least = remedies(config, limit, device)
    if found:
        lines.append("any of these would make it fit, as predicted for the busiest rank" + _note(config) + ":")
        return lines + [f"  {remedy}   {size(remedy.peak_bytes)}" for remedy in found]
    nearest = f": {least} comes nearest with {size(least.peak_bytes)}, but {size(limit)} would fit" if least else ""
    ranks = counted(parallel.pp * parallel.dp * parallel.tp, "rank")
    return [*lines, f"no one or two settings make it fit on {ranks}{nearest}; take more ranks, or a smaller model.seq_length."]


def _note(config: Config) -> str:
    """What a change may cost where numbers repeat."""
    mode = config.run.determinism
    return "" if mode == "fast" else f' (once it has begun, run.determinism = "{mode}" refuses some; recomputation never)'
