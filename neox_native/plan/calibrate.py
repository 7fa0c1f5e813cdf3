"""Measure the machine at hand: matrix products and attention of the model's shapes, copies, collectives."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from neox_native.config.schema import Config
from neox_native.dtypes import DTYPES
from neox_native.model.kinds import kinds_of_layers
from neox_native.plan.hardware import Gpu
from neox_native.plan.shares import layer_costs

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
COLLECTIVE_BYTES = {"cuda": 1 << 28, "cpu": 1 << 24}


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median time of `work`, after one run that does not count."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def products_flops_per_second(config: Config, device: torch.device) -> float:
    """The speed of the layer kinds' projections, each shape once, as one tensor-parallel rank multiplies them."""
    model, tp = config.model, config.parallel.tp
    rows, dtype = config.training.micro_batch_size * model.seq_length, DTYPES[config.training.precision]
    costs = [each for kinds in set(kinds_of_layers(model)) for each in layer_costs(model, kinds, tp)]
    flops = seconds = 0.0
    for inner, columns in {product.held(tp) for each in costs for product in each.products}:
        left, right = (torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, inner), (inner, columns)))
        flops += 2.0 * rows * inner * columns
        seconds += seconds_of(partial(torch.matmul, left, right), device)
    return flops / seconds


def attention_flops_per_second(config: Config, device: torch.device) -> float:
    """The speed of causal attention, forward; it counts half of all pairs of positions."""
    model, dtype = config.model, DTYPES[config.training.precision]
    shape = (config.training.micro_batch_size, model.num_heads // config.parallel.tp, model.seq_length, model.head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    batch, heads, length, width = shape
    seconds = seconds_of(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True), device)
    return 2.0 * batch * heads * length * length * width / seconds


def copy_bytes_per_second(device: torch.device) -> float:
    """The speed at which a copy reads and writes, both counted."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() / seconds_of(lambda: target.copy_(source), device)


def collective_speed(device: torch.device) -> tuple[float, float]:
    """The bytes per second that each rank sends in a large all-reduce over all ranks, and the seconds of a tiny one."""
    ranks = dist.get_world_size()
    large = torch.zeros(COLLECTIVE_BYTES[device.type] // 4, device=device)
    small = torch.zeros(1, device=device)
    speed = 2 * (ranks - 1) / ranks * large.numel() * 4 / seconds_of(lambda: dist.all_reduce(large), device)
    return speed, seconds_of(lambda: dist.all_reduce(small), device)


def calibrate(config: Config, device: torch.device, like: Gpu, name: str) -> Gpu:
    """Measure the device at hand. One process cannot see the links: it takes them from `like`.

    Args:
        like: gives the peak, of which efficiencies are shares, the size of the memory and the links.
    """
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else like.memory_bytes
    measured = dataclasses.replace(
        like,
        name=name,
        memory_bytes=float(memory),
        matmul_efficiency=products_flops_per_second(config, device) / like.peak_flops_per_second,
        attention_efficiency=attention_flops_per_second(config, device) / like.peak_flops_per_second,
        memory_efficiency=copy_bytes_per_second(device) / like.memory_bytes_per_second,
        source=f"measured on {name} with torch {torch.__version__}; peak, memory and network from {like.name}",
    )
    if dist.is_initialized() and dist.get_world_size() > 1:
        speed, start = collective_speed(device)
        measured = dataclasses.replace(measured, node_bytes_per_second=speed, link_efficiency=1.0, collective_seconds=start)
    return measured


def to_toml(gpu: Gpu) -> str:
    """The hardware file of one device."""
    lines = [f'["{gpu.name}"]']
    for field in dataclasses.fields(gpu):
        value = getattr(gpu, field.name)
        if field.name != "name":
            lines.append(f"{field.name} = " + (f'"{value}"' if isinstance(value, str) else f"{value:.6g}"))
    return "\n".join(lines) + "\n"
