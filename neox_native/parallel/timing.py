"""How long a rank computes, measured without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds that its blocks took since the last reading: the device's time, where there is a GPU."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time until the block ends."""
        if self.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self.events.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start

    def read(self) -> float:
        """Seconds counted since the last call. On a GPU it waits for the last block: call it on logged steps."""
        for begin, end in self.events:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1e3
        seconds, self.seconds = self.seconds, 0.0
        self.events.clear()
        return seconds


class Timing:
    """What an engine tells about its progress."""

    def __init__(self, device: torch.device):
        self.compute = Stopwatch(device)
        """Forward and backward passes of this rank, the waits between them left out."""
        self.whole = Stopwatch(device)
        """All forward and backward passes of a step with the waits between them."""
        self.on_microbatch: Callable[[int], None] = lambda index: None
        """Called as a microbatch begins."""
