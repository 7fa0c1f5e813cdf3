"""The rates of a device, and attention on it: every kernel that torch has, and packed documents."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from neox_native.config.schema import Config, Model
from neox_native.metrics.throughput import device_name
from neox_native.model.transformer import Transformer
from neox_native.parallel.recompute import recompute
from neox_native.plan.calibrate import calibrate, seconds_of
from neox_native.plan.hardware import gpu_of
from tools.benchmarks.gpu_training import device_of, first_line

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
RECOMPUTED = {"none": None, "selective": True, "full": False}
"""Name -> whether recomputation is selective; None for none."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def rates(config: Config, device_type: str) -> Iterator[list[str]]:
    """What `tools/plan.py calibrate` measures."""
    device = device_of(device_type)
    like = gpu_of(device_name(device))
    gpu = calibrate(config, device, like, device_name(device))
    for what, share in (("matrix products", gpu.matmul_efficiency), ("attention, forward, causal", gpu.attention_efficiency)):
        yield [what, f"{share * like.peak_flops_per_second / 1e12:.1f} TFLOP/s", f"{share:.1%} of {like.name}"]
    copied = gpu.memory_efficiency * like.memory_bytes_per_second
    yield ["copy", f"{copied / 1e12:.2f} TB/s", f"{gpu.memory_efficiency:.1%} of {like.name}"]


def backends(device_type: str, head_sizes: tuple[int, ...], seq_length: int, num_sequences: int, hidden_size: int) -> Iterator[list[str]]:
    """A row for each head size and kernel; half of all pairs of positions count."""
    device = device_of(device_type)
    for head_size in head_sizes:
        num_heads = max(1, hidden_size // head_size)
        shape = (num_sequences, num_heads, seq_length, head_size)
        inputs = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        flops = 2.0 * num_sequences * num_heads * seq_length**2 * head_size
        attends: dict[str, Attend] = {name: partial(within, backend) for name, backend in BACKENDS.items()}
        if device.type == "cuda":  # a CPU has no backward pass of it
            attends["FlexAttention, compiled"] = flex(seq_length, device)
        for name, attend in attends.items():
            try:
                seconds = [seconds_of(partial(passes, attend, inputs, both), device) for both in (False, True)]
                yield [str(head_size), name, *(f"{flops * many / each / 1e12:.0f}" for each, many in zip(seconds, (1.0, 3.5)))]
            except Exception as error:
                refused = re.search("No (available kernel|viable backend)", str(error))
                yield [str(head_size), name, "torch has none here" if refused else first_line(error)]


def within(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by one kernel."""
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def flex(seq_length: int, device: torch.device) -> Attend:
    """Causal attention by FlexAttention."""
    blocks = create_block_mask(lambda _b, _h, query, key: key <= query, None, None, seq_length, seq_length, device=device.type)
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=blocks)


def passes(attend: Attend, inputs: list[Tensor], backward: bool) -> None:
    """Forward, and backward with it; its 2.5 times as many operations count together with the forward pass's."""
    if not backward:
        with torch.no_grad():
            attend(*inputs)
        return
    torch.autograd.grad(attend(*inputs).sum(), inputs)


def documents(device_type: str, head_sizes: tuple[int, ...], seq_length: int, num_sequences: int, hidden_size: int) -> Iterator[list[str]]:
    """A layer on packed documents: as it trains on this device beside a mask of numbers, and under recomputation. How far gradients
    are off is the largest difference from the mask's over the largest gradient."""
    device = device_of(device_type)
    for head_size in head_sizes:
        num_heads = max(1, hidden_size // head_size)
        model = Model(num_layers=1, hidden_size=num_heads * head_size, num_heads=num_heads, seq_length=seq_length, vocab_size=128)
        try:
            reference, masked = gradients(model, num_sequences, device, None, with_mask=True)
            rows = {name: gradients(model, num_sequences, device, how, with_mask=False) for name, how in RECOMPUTED.items()}
            off = [f"{distance(found, reference):.1e}" for found, _ in rows.values()]
            yield [str(head_size), f"{rows['none'][1] * 1e3:.2f}", f"{masked * 1e3:.2f}", *off]
        except Exception as error:
            yield [str(head_size), first_line(error)]


def gradients(
    model: Model, num_sequences: int, device: torch.device, selective: bool | None, with_mask: bool
) -> tuple[list[Tensor], float]:
    """Gradients of every parameter, and the median seconds of a forward and a backward pass."""
    whole = Transformer(model, seed=1).to(device, torch.bfloat16)
    whole.build_tables(device)
    if with_mask:
        whole.attends_in_blocks = lambda _device: False
    if selective is not None:
        recompute(whole.layers["0"], selective)
    generator = torch.Generator().manual_seed(2)
    shape = (num_sequences, model.seq_length)
    tokens_BT = torch.randint(0, model.vocab_size, shape, generator=generator).to(device)
    documents_BT = (torch.rand(shape, generator=generator) < 4 / model.seq_length).cumsum(1).to(device)

    def both() -> None:
        whole.zero_grad()
        whole(tokens_BT, documents_BT=documents_BT, targets_BT=tokens_BT).mean().backward()

    seconds = seconds_of(both, device)
    return [parameter.grad.float() for parameter in whole.parameters()], seconds


def distance(found: list[Tensor], reference: list[Tensor]) -> float:
    """The largest difference of any tensor, over that tensor's largest value."""
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in zip(found, reference))
