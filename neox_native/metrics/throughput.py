"""How fast and how large: step time, tokens/s, FLOP/s, MFU, peak memory."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from neox_native.parallel.timing import Stopwatch

PEAK_FLOPS_PER_SECOND = {
    "B200": 2.25e15,
    "GB200": 2.5e15,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,
}
"""Dense bf16 and fp16 peak by a part of the device's name, from the vendors' data sheets; MI250X per die."""


def peak_flops_per_second(device_name: str, precision: str) -> float | None:
    """Peak of a device for `precision` ("fp32" | "bf16" | "fp16"), or None where it is not known.

    The longest matching name wins, so that "H100 PCIe" is not taken for "H100". fp32 has none: with TF32 on or off
    its peak differs eightfold.
    """
    matches = [name for name in PEAK_FLOPS_PER_SECOND if name in device_name]
    if precision == "fp32" or not matches:
        return None
    return PEAK_FLOPS_PER_SECOND[max(matches, key=len)]


def device_name(device: torch.device) -> str:
    """Name of a GPU as its driver gives it; "cpu" for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far [bytes]: of torch's allocator on a GPU, of the resident process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes(device: torch.device) -> int:
    """Memory there is [bytes]: of the GPU, or of the machine, which its processes share."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Speed:
    """Mean over the steps since the last reading."""

    step_seconds: float
    tokens_per_second: float
    tflops_per_device: float
    mfu: float | None
    """As PaLM's appendix B counts operations, see `model.flops`."""
    mfu_causal: float | None
    """With the causal half of attention alone."""


class Throughput:
    """Times steps between two readings of the clock.

    Work on a GPU is only queued when a step returns, so a single step cannot be timed without waiting for the device.
    The loop reads the loss on logged steps, which waits once; read `speed` after that, and the mean over the steps in
    between is exact.

    What is no training is left out as the device sees it: it computes queued steps while the process waits for a signal or
    writes a checkpoint, and that time is training. A GPU is paused from when it has done what was queued before until
    something new is queued, which events on its stream measure.

    Args:
        tokens_per_step: of the global batch [tokens].
        flops_per_token: `model_flops_per_token` of the model, all pairs of positions and the causal half [FLOP].
        devices: ranks of the job.
        peak: `peak_flops_per_second` of one device, or None.
        pauses: times what is no training.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        tokens_per_step: int,
        flops_per_token: tuple[int, int],
        devices: int,
        peak: float | None,
        pauses: Stopwatch,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.devices, self.peak = devices, peak
        self._pauses, self._clock = pauses, clock
        self._steps = 0
        self._since = clock()

    def step_done(self) -> None:
        """Count one more step."""
        self._steps += 1

    def speed(self) -> Speed:
        """Mean since the last call (or since the start), over the steps done since; at least one. On a GPU it waits for the
        last pause to end."""
        assert self._steps > 0, "no step was done since the last reading"
        paused = self._pauses.read()
        now = self._clock()
        step_seconds = max(now - self._since - paused, 1e-9) / self._steps
        self._steps, self._since = 0, now
        tokens_per_second = self.tokens_per_step / step_seconds
        palm, causal = (tokens_per_second * flops / self.devices for flops in self.flops_per_token)
        mfu = (None, None) if self.peak is None else (palm / self.peak, causal / self.peak)
        return Speed(step_seconds, tokens_per_second, palm / 1e12, *mfu)

    def paused(self) -> AbstractContextManager[None]:
        """Leave the body's time out: evaluation and saving are not training."""
        return self._pauses.running()
