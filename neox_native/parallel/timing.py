"""How long a rank computes, measured without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds that its blocks took since the last reading: the device's time, where there is a GPU."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, 0.0
        self.events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time until the block ends."""
        if self.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self.events.append((begin, end))
            while self.events and self.events[0][1].query():  # what is over by now, without a wait
                self._count(*self.events.popleft())
        else:
            start = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start

    def read(self) -> float:
        """Seconds counted since the last call. On a GPU it waits for the last block: call it on logged steps."""
        while self.events:
            self.events[-1][1].synchronize()
            self._count(*self.events.popleft())
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _count(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self.seconds += begin.elapsed_time(end) / 1e3


class Timing:
    """What an engine tells about its progress."""

    def __init__(self, device: torch.device):
        self.compute = Stopwatch(device)
        """Forward and backward passes of this rank, the waits between them left out."""
        self.whole = Stopwatch(device)
        """All forward and backward passes of a step with the waits between them."""
        self.on_microbatch: Callable[[int], None] = lambda index: None
        """Called as a microbatch begins."""
