"""A model in the configurations that decide its speed, and as others train it. One rank, one microbatch a step."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from neox_native.config.check import require
from neox_native.config.schema import Config
from neox_native.data.loader import StepBatch
from neox_native.dtypes import DTYPES
from neox_native.engine.build import build_engine, build_model, build_step
from neox_native.launch import Launch, start_process_group
from neox_native.mesh import build_mesh
from neox_native.metrics.throughput import device_name, peak_flops_per_second, peak_memory_bytes
from neox_native.model import initialize
from neox_native.model.flops import model_flops_per_token
from neox_native.model.transformer import Transformer
from neox_native.plan.costs import predict
from neox_native.plan.dry_run import fake_batch
from neox_native.train.start import choose_arithmetic
from tools.benchmarks.peers import adamw_settings, parameter_groups, trained_by

COLUMNS = ["", "ms per step", "tokens/s", "MFU", "MFU, causal", "reserved GiB", "planned GiB", "waits"]
WARMUP_STEPS = 3
SECONDS = 5.0
"""For the steps of one configuration, after warmup."""
CONFIGURATIONS: dict[str, tuple[bool, bool, str]] = {
    "compiled with the loss, none": (True, True, "none"),
    "compiled, none": (True, False, "none"),
    "eager, none": (False, False, "none"),
    "compiled, full": (True, False, "full"),
    "eager, full recomputation": (False, False, "full"),
}
"""Name -> whether blocks are compiled, whether the loss is, what is recomputed. Dearest to know first: late ones may be cut."""
Step = Callable[[Tensor], Any]
"""One step on token ids [B, T]."""


def device_of(device_type: str) -> torch.device:
    """This process's device, with a process group of one rank."""
    device = torch.device("cuda", 0) if device_type == "cuda" else torch.device("cpu")
    if not dist.is_initialized():
        start_process_group(device, Launch(0, 0, 1))
    return device


def configurations(config: Config, device_type: str, steps: int) -> Iterator[list[str]]:
    """A row for each of `CONFIGURATIONS`."""
    device = device_of(device_type)
    choose_arithmetic(config.run, device)
    for name, (compiled, with_loss, recompute) in CONFIGURATIONS.items():
        training = replace(config.training, activation_checkpointing=recompute)
        variant = replace(config, training=training, compile=replace(config.compile, enabled=compiled))
        yield [name, *measured(variant, device, steps, partial(ours, variant, with_loss), predict(require(variant, 1)).peak_bytes)]


def peers(config: Config, device_type: str, steps: int) -> Iterator[list[str]]:
    """The same model and batch in torch's data parallelism. All keep every activation and clip nothing; DDP has bf16 weights
    without fp32 masters, `fully_shard` fp32 shards, as ours."""
    device = device_of(device_type)
    choose_arithmetic(config.run, device)
    for name, make in (("DistributedDataParallel", ddp), ("fully_shard", fsdp)):
        for compiled in (False, True):
            figures = measured(config, device, steps, partial(make, config, compiled), None)
            yield [f"{name}, {'compiled' if compiled else 'eager'}", *figures]


def ours(config: Config, compiled_loss: bool, device: torch.device) -> Step:
    """This project's step. First values are drawn on the device, where that takes no time."""
    config = require(config, 1)
    mesh = build_mesh(config.parallel, device)
    with mock.patch.object(initialize, "draw", partial(drawn, device)):
        parts, optimizer = build_model(config, mesh, device)
    parts[0].readout.cross_entropy.compiled = compiled_loss
    step = build_step(config, mesh, device, build_engine(config, mesh, device, parts, optimizer), optimizer)

    def on(tokens_BT: Tensor) -> Any:
        return step(batch_of(config, tokens_BT), 1e-4)

    return on


def drawn(device: torch.device, _name: str, card: Any, _seed: int) -> Tensor:
    """First values of no run: normal, a matrix's as small as usual."""
    if len(card.shape) == 1:
        return torch.ones(card.shape, device=device)
    return torch.randn(card.shape, device=device) * 0.02


def batch_of(config: Config, tokens_BT: Tensor) -> StepBatch:
    """A step of one microbatch."""
    batch = fake_batch(config)
    batch.model_fields["tokens_BT"], batch.model_fields["targets_BT"] = tokens_BT[None], tokens_BT.roll(-1, 1)[None]
    return batch


def plain(config: Config, compiled: bool, dtype: torch.dtype, device: torch.device) -> Transformer:
    """The model, whole."""
    with device:
        model = Transformer(config.model).to(dtype)
    model.build_tables(device)
    for block in model.layers.values():
        if compiled:
            block.compute = torch.compile(block.compute, fullgraph=True, dynamic=False)
    return model


def whole_loss(compiled: bool) -> Callable[..., Tensor]:
    """The usual loss, over all logits at once, as a function of a model and its token ids [B, T]."""
    loss = torch.compile(cross_entropy, dynamic=False) if compiled else cross_entropy
    return lambda model, tokens_BT: loss(model(tokens_BT), tokens_BT.roll(-1, 1))


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean over the tokens, in fp32."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def ddp(config: Config, compiled: bool, device: torch.device) -> Step:
    """DistributedDataParallel with fused AdamW."""
    model = plain(config, compiled, DTYPES[config.training.precision], device)
    optimizer = torch.optim.AdamW(parameter_groups(model), **adamw_settings(fused=True))
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return trained_by(wrapped, optimizer, whole_loss(compiled))


def fsdp(config: Config, compiled: bool, device: torch.device) -> Step:
    """`fully_shard` unit by unit, with fused AdamW."""
    model = plain(config, compiled, torch.float32, device)
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[config.training.precision], reduce_dtype=torch.float32)
    mesh = build_mesh(require(config, 1).parallel, device).shards().mesh
    for unit in (model.embed_in, *model.layers.values(), [model.readout.final_layer_norm, model.readout.embed_out], model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    return trained_by(model, torch.optim.AdamW(parameter_groups(model), **adamw_settings(fused=True)), whole_loss(compiled))


def measured(
    config: Config, device: torch.device, steps: int, make: Callable[[torch.device], Step], planned: int | None
) -> list[str]:
    """A row's figures; memory that runs out is one of them."""
    forget(device)
    try:
        seconds, reserved, waits = trained(config, device, steps, make)
    except Exception as error:
        return [f"failed: {first_line(error)}"]
    speed = config.training.micro_batch_size * config.model.seq_length / seconds
    peak = peak_flops_per_second(device_name(device), config.training.precision)
    counted = (model_flops_per_token(config.model, causal=causal) for causal in (False, True))
    mfu = ["?" if peak is None else f"{speed * flops / peak:.1%}" for flops in counted]
    memory = [f"{reserved / 2**30:.1f}", "" if planned is None else f"{planned / 2**30:.1f}"]
    return [f"{seconds * 1e3:.1f}", f"{speed:,.0f}", *mfu, *memory, waits]


def trained(config: Config, device: torch.device, steps: int, make: Callable[[torch.device], Step]) -> tuple[float, int, str]:
    """Seconds per step, bytes reserved at most and what waits. The model lives no longer than this call."""
    step, tokens_BT = make(device), tokens_of(config, device)
    seconds = seconds_per_step(step, tokens_BT, device, steps)
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory_bytes(device)
    return seconds, reserved, what_waits(step, tokens_BT, device)


def tokens_of(config: Config, device: torch.device) -> Tensor:
    """Token ids [B, T], the same for all."""
    shape = (config.training.micro_batch_size, config.model.seq_length)
    return torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(1)).to(device)


def seconds_per_step(step: Step, tokens_BT: Tensor, device: torch.device, steps: int) -> float:
    """Mean of the steps that fit into `SECONDS`; nothing waits for the device between them."""
    for _ in range(WARMUP_STEPS):
        begin = now(device)
        step(tokens_BT)
        last = now(device) - begin
    count = max(1, min(steps, int(SECONDS / last)))
    begin = now(device)
    for _ in range(count):
        step(tokens_BT)
    return (now(device) - begin) / count


def now(device: torch.device) -> float:
    """Seconds, when all that was queued is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def what_waits(step: Step, tokens_BT: Tensor, device: torch.device) -> str:
    """What in a step waits for the GPU: the first such thing, or "nothing"."""
    if device.type != "cuda":
        return ""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(tokens_BT)
    except RuntimeError as error:
        return first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "nothing"


def first_line(error: BaseException) -> str:
    """What fits into a table."""
    told = (str(error) or type(error).__name__).splitlines()[0].replace("|", "/")
    return "out of memory" if isinstance(error, torch.cuda.OutOfMemoryError) else f"{type(error).__name__}: {told[:80]}"


def forget(device: torch.device) -> None:
    """Give back what earlier configurations had, compiled code too."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
