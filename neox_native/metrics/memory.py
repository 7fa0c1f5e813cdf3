"""What holds the device's memory, and what was seen of it at the moment when it ran out."""

from __future__ import annotations

import pickle
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from neox_native.durable import make_folder, write_whole
from neox_native.errors import UserError
from neox_native.metrics.throughput import memory_bytes, peak_memory_bytes

FOLDER = "out_of_memory"
"""Name of the folder, in the run's."""
MOST_EVENTS = 100_000
"""Allocations, the newest, that a history keeps: some KB of host memory each."""


@dataclass(frozen=True)
class Usage:
    """Of a device's memory, in bytes. A CPU's is its whole process's, at its peak, and of the machine an equal part for each
    of its processes."""

    allocated: int
    """What tensors hold."""
    reserved: int
    """What torch's allocator holds, `allocated` included."""
    others: int
    """What the driver, NCCL and other processes hold of a GPU."""
    total: int

    @property
    def available(self) -> int:
        """What tensors may have."""
        return self.total - self.others


def usage_of(device: torch.device, local_world_size: int) -> Usage:
    """The present one; `local_world_size` processes share this machine."""
    if device.type != "cuda":
        process = peak_memory_bytes(device)
        return Usage(process, process, 0, memory_bytes(device) // local_world_size)
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    return Usage(torch.cuda.memory_allocated(device), reserved, total - free - reserved, total)


class Recorder:
    """Is there when a GPU's allocator gives up: later, much of what filled the memory is gone.

    Making one costs nothing in training but where a history is asked for.

    Args:
        path: takes the snapshot, for pytorch.org/memory_viz.
        history: with the stack of each allocation.
    """

    def __init__(self, device: torch.device, path: Path, history: bool, local_world_size: int = 1) -> None:
        self.device, self.path, self.local_world_size = device, path, local_world_size
        self.usage: Usage | None = None
        self.requested = 0
        self.written = False
        if device.type == "cuda":
            if history:
                torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=MOST_EVENTS)
            with suppress(AttributeError, RuntimeError):  # private to torch, and cudaMallocAsync does not know it
                torch._C._cuda_attach_out_of_memory_observer(self.out_of_memory)

    def out_of_memory(self, device: int, requested: int, total: int, free: int) -> None:
        """Called by the allocator, in whichever thread asked for `requested` bytes that it cannot give. Some callers make do
        with less and go on."""
        with suppress(UserError, OSError, RuntimeError, MemoryError):  # there is enough trouble
            self.usage, self.requested = usage_of(self.device, self.local_world_size), requested
            make_folder(self.path.parent)
            write_whole(self.path, pickle.dumps(torch.cuda.memory._snapshot()))
            self.written = True
