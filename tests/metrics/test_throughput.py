"""Speed is a mean over whole steps, and pauses are left out."""

from __future__ import annotations

import pytest
import torch

from neox_native.metrics.throughput import Throughput, device_name, peak_flops_per_second, peak_memory_bytes
from neox_native.parallel.timing import Stopwatch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Gpu(Clock):
    """A GPU that works off what the process has queued, beside the process's clock; `Event` is one on its stream."""

    done = 0.0
    """When all that is queued will be done."""

    def queue(self, seconds: float) -> None:
        self.done = max(self.done, self.now) + seconds

    def wait(self) -> None:
        self.now = max(self.now, self.done)

    def Event(gpu, enable_timing: bool) -> object:  # noqa: N802
        class Event:
            def record(self) -> None:
                self.at = gpu.done = max(gpu.done, gpu.now)

            def query(self) -> bool:
                return self.at <= gpu.now

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        return Event()


def test_speed_is_the_mean_since_the_last_reading() -> None:
    clock = Clock()
    throughput = Throughput(1000, (10**9, 8 * 10**8), devices=2, peak=1e13, pauses=Stopwatch(CPU, clock), clock=clock)
    for _ in range(4):
        throughput.step_done()
    clock.now = 2.0
    speed = throughput.speed()
    assert (speed.step_seconds, speed.tokens_per_second) == (0.5, 2000.0)
    assert (speed.tflops_per_device, speed.mfu, speed.mfu_causal) == (1.0, 0.1, 0.08)
    throughput.step_done()
    clock.now = 3.0
    assert throughput.speed().step_seconds == 1.0


def test_pauses_are_left_out() -> None:
    clock = Clock()
    throughput = Throughput(1000, (1, 1), 1, None, Stopwatch(CPU, clock), clock)
    throughput.step_done()
    clock.now = 1.0
    with throughput.paused():
        clock.now = 50.0
    speed = throughput.speed()
    assert speed.step_seconds == 1.0 and speed.mfu is None


@pytest.mark.parametrize("waits, copies, idle", [(4, 0, 0), (25, 0, 5), (4, 3, 3), (30, 3, 10)])
def test_a_gpu_goes_on_with_queued_steps_while_the_process_waits(
    waits: int, copies: int, idle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of 10 seconds, with a save of `copies` seconds on the GPU and `waits` of the process between them."""
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.Event)
    throughput = Throughput(1000, (1, 1), 1, None, Stopwatch(GPU, gpu), gpu)
    gpu.queue(20)
    for _ in range(2):
        throughput.step_done()
    with throughput.paused():
        gpu.queue(copies)
        gpu.now += waits
    gpu.queue(10)
    throughput.step_done()
    gpu.wait()
    assert gpu.now == 30 + idle
    assert throughput.speed().step_seconds == 10.0


def test_peak_is_known_by_the_longest_name_and_never_for_fp32() -> None:
    assert peak_flops_per_second("NVIDIA H200", "bf16") == 989e12
    assert peak_flops_per_second("NVIDIA H200 NVL", "bf16") == 835e12
    assert peak_flops_per_second("NVIDIA H100 PCIe", "fp16") == 756e12
    assert peak_flops_per_second("NVIDIA GB200", "bf16") == 2.5e15
    assert peak_flops_per_second("NVIDIA H200", "fp32") is None
    assert peak_flops_per_second(device_name(torch.device("cpu")), "bf16") is None


def test_peak_memory_of_a_process_is_in_bytes() -> None:
    assert 10e6 < peak_memory_bytes(torch.device("cpu")) < 1e12
