"""Speed is a mean over whole steps, and pauses are left out."""

from __future__ import annotations

import torch

from neox_native.metrics.throughput import Throughput, device_name, peak_flops_per_second, peak_memory_bytes


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_speed_is_the_mean_since_the_last_reading() -> None:
    clock = Clock()
    throughput = Throughput(tokens_per_step=1000, flops_per_token=10**9, devices=2, peak=1e13, clock=clock)
    for _ in range(4):
        throughput.step_done()
    clock.now = 2.0
    speed = throughput.speed()
    assert (speed.step_seconds, speed.tokens_per_second) == (0.5, 2000.0)
    assert (speed.tflops_per_device, speed.mfu) == (1.0, 0.1)
    throughput.step_done()
    clock.now = 3.0
    assert throughput.speed().step_seconds == 1.0


def test_pauses_are_left_out() -> None:
    clock = Clock()
    throughput = Throughput(1000, 1, 1, None, clock)
    throughput.step_done()
    clock.now = 1.0
    with throughput.paused():
        clock.now = 50.0
    speed = throughput.speed()
    assert speed.step_seconds == 1.0 and speed.mfu is None


def test_peak_is_known_by_the_longest_name_and_never_for_fp32() -> None:
    assert peak_flops_per_second("NVIDIA H200", "bf16") == 989e12
    assert peak_flops_per_second("NVIDIA H100 PCIe", "fp16") == 756e12
    assert peak_flops_per_second("NVIDIA GB200", "bf16") == 2.5e15
    assert peak_flops_per_second("NVIDIA H200", "fp32") is None
    assert peak_flops_per_second(device_name(torch.device("cpu")), "bf16") is None


def test_peak_memory_of_a_process_is_in_bytes() -> None:
    assert 10e6 < peak_memory_bytes(torch.device("cpu")) < 1e12
