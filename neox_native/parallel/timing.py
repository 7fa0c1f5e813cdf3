"""How long a rank computes, measured without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds that its blocks took since the last reading: the device's time, where there is a GPU."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self.device, self.clock, self.seconds, self.is_running = device, clock, 0.0, False
        self.events: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time until the block ends."""
        self.is_running = True
        try:
            with self._timed(1):
                yield
        finally:
            self.is_running = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count a block, a wait for other ranks, inside one that is counted."""
        if self.is_running:
            with self._timed(-1):
                yield
        else:
            yield

    @contextmanager
    def _timed(self, sign: int) -> Iterator[None]:
        if self.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self.events.append((begin, end, sign))
            while self.events and self.events[0][1].query():  # what is over by now, without a wait
                self._count(*self.events.popleft())
        else:
            start = self.clock()
            yield
            self.seconds += sign * (self.clock() - start)

    def read(self) -> float:
        """Seconds counted since the last call. On a GPU it waits for the last block: call it on logged steps."""
        while self.events:
            self.events[-1][1].synchronize()
            self._count(*self.events.popleft())
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _count(self, begin: torch.cuda.Event, end: torch.cuda.Event, sign: int) -> None:
        self.seconds += sign * begin.elapsed_time(end) / 1e3


class Timing:
    """What an engine tells about its progress."""

    def __init__(self, device: torch.device):
        self.compute = Stopwatch(device)
        """Forward and backward passes of this rank. Waits between them and for ZeRO's collectives are left out; those
        for tensor-parallel peers, which DTensor hides, are not."""
        self.whole = Stopwatch(device)
        """All forward and backward passes of a step with the waits between them."""
        self.on_microbatch: Callable[[int], None] = lambda index: None
        """Called as a microbatch begins."""
