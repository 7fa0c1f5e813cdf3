"""ZeRO beside what torch itself offers: tokens/s and peak memory of one training step, same model, batch and ranks.

Every contender trains in fresh processes, so that memory is its own. None clips; ours computes the gradient norm all
the same. The peers update with AdamW's foreach kernels, torch's default on a GPU; ours is fused, and so are two more
contenders. On CPU the ranks are forked and meet over gloo; on a GPU one rank trains, which measures what sharding costs
where there is nothing to shard.

glibc keeps much of what is freed, and every contender looks as hungry as the hungriest. So memory is measured in a pass
of its own, in which every large block goes back to the system at once; that costs time, which the other pass measures.
There each contender and the first take turns step by step, so that a noisy machine disturbs both alike; figures are
medians, ratios those of the pair. It takes 5 GB.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from neox_native.config.schema import Model, Optimizer, Parallel
from neox_native.engine.build import units_of
from neox_native.mesh import Mesh, build_mesh
from neox_native.model import initialize
from neox_native.model.transformer import Transformer, cards
from neox_native.optim.groups import optimizer_factory
from neox_native.zero.layout import ZeroStage
from neox_native.zero.optimizer import ShardedOptimizer

MIB = 2**20
SETTINGS = Optimizer(name="adamw", lr=1e-4)
MEMORY_STEPS = 3
MMAP_THRESHOLD_OPTION, MMAP_THRESHOLD_BYTES = -3, 65536


@dataclass(frozen=True)
class Workload:
    """What every contender trains."""

    model: Model
    sequences_per_rank: int
    dtype: torch.dtype
    device_type: str
    steps: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one rank's step."""
        return self.sequences_per_rank * self.model.seq_length


CPU = Workload(
    Model(num_layers=12, hidden_size=512, num_heads=8, seq_length=64, vocab_size=16384),
    sequences_per_rank=2,
    dtype=torch.float32,
    device_type="cpu",
    steps=10,
)
GPU = Workload(
    Model(num_layers=12, hidden_size=768, num_heads=12, seq_length=2048, vocab_size=50304),
    sequences_per_rank=8,
    dtype=torch.bfloat16,
    device_type="cuda",
    steps=20,
)


class Figures(NamedTuple):
    """What one step showed; memory is above what the process had before the contender came."""

    seconds: float
    peak_bytes: int
    steady_bytes: int
    loss: float


Step = Callable[[Tensor], Tensor]
"""One training step on this rank's tokens [B, T]; returns its loss."""


def loss_of(model: Callable[[Tensor], Tensor], tokens_BT: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next token, the row read as a ring."""
    logits_BTV = model(tokens_BT)
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), tokens_BT.roll(-1, 1).flatten())


def ours(stage: int, work: Workload, mesh: Mesh, device: torch.device) -> Step:
    """One of our stages."""
    with torch.device("meta"):
        model = Transformer(work.model).to(work.dtype)
    units = units_of({0: model}, work.model, Parallel(dp=mesh.rows.size), mesh)
    optimizer = ShardedOptimizer(units, ZeroStage(stage), optimizer_factory(SETTINGS), work.dtype, device)
    optimizer.materialize(lambda spec: initialize.draw(spec.name, cards(work.model)[spec.name], seed=0))
    model.build_tables(device)
    num_ranks = mesh.rows.size

    def step(tokens_BT: Tensor) -> Tensor:
        loss = loss_of(model, tokens_BT)
        optimizer.microbatch(0, last=True)
        (loss / num_ranks).backward()
        optimizer.step(SETTINGS.lr, clip=0.0)
        return loss

    return step


def plain_model(work: Workload, device: torch.device) -> Transformer:
    """The model with the same weights as ours, whole."""
    return Transformer(work.model, seed=0).to(device=device, dtype=work.dtype)


def trained_by(
    model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, loss_of: Callable[..., Tensor] = loss_of
) -> Step:
    """The usual three lines."""

    def step(tokens_BT: Tensor) -> Tensor:
        loss = loss_of(model, tokens_BT)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def parameter_groups(model: Transformer) -> list[dict[str, Any]]:
    """The decay groups that ours has."""
    known = cards(model.config)
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[0 if known[model.global_name(name)].decay else 1]["params"].append(parameter)
    return groups


def adamw_settings(fused: bool) -> dict[str, Any]:
    """The settings that ours has; without `fused`, foreach kernels."""
    beta1, beta2 = SETTINGS.betas
    kernels = {"fused": True} if fused else {"foreach": True}
    return {
        "lr": SETTINGS.lr,
        "betas": (beta1, beta2),
        "eps": SETTINGS.eps,
        "weight_decay": SETTINGS.weight_decay,
    } | kernels


def ddp(fused: bool, work: Workload, _mesh: Mesh, device: torch.device) -> Step:
    """DistributedDataParallel with AdamW on every rank."""
    model = plain_model(work, device)
    optimizer = torch.optim.AdamW(parameter_groups(model), **adamw_settings(fused))
    return trained_by(DistributedDataParallel(model, gradient_as_bucket_view=True), optimizer)


def zero_redundancy(work: Workload, _mesh: Mesh, device: torch.device) -> Step:
    """DistributedDataParallel with ZeroRedundancyOptimizer: whole parameters dealt out to ranks, then broadcast."""
    model = plain_model(work, device)
    data_parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        parameter_groups(model), torch.optim.AdamW, parameters_as_bucket_view=True, **adamw_settings(fused=False)
    )
    return trained_by(data_parallel, optimizer)


def fsdp(reshard: bool, fused: bool, work: Workload, mesh: Mesh, device: torch.device) -> Step:
    """`fully_shard` on the same units as ours; with bf16, fp32 shards and bf16 compute."""
    model = plain_model(replace(work, dtype=torch.float32), device)
    policy = MixedPrecisionPolicy(param_dtype=work.dtype, reduce_dtype=torch.float32)
    options = {"mesh": mesh.shards().mesh, "reshard_after_forward": reshard, "mp_policy": policy}
    for unit in (model.embed_in, *model.layers.values(), [model.readout.final_layer_norm, model.readout.embed_out], model):
        fully_shard(unit, **options)
    return trained_by(model, torch.optim.AdamW(parameter_groups(model), **adamw_settings(fused)))


CONTENDERS: dict[str, Callable[[Workload, Mesh, torch.device], Step]] = {
    "DistributedDataParallel": lambda *rest: ddp(False, *rest),
    "DistributedDataParallel, fused": lambda *rest: ddp(True, *rest),
    "ZeroRedundancyOptimizer": zero_redundancy,
    "fully_shard": lambda *rest: fsdp(True, False, *rest),
    "fully_shard, fused": lambda *rest: fsdp(True, True, *rest),
    "fully_shard, not resharding": lambda *rest: fsdp(False, False, *rest),
    "stage 0": lambda *rest: ours(0, *rest),
    "stage 1": lambda *rest: ours(1, *rest),
    "stage 2": lambda *rest: ours(2, *rest),
    "stage 3": lambda *rest: ours(3, *rest),
}


def resident_bytes(device: torch.device, peak: bool) -> int:
    """Memory of this process: resident on CPU, allocated on a GPU; now, or the most since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    label = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(label))
    return int(line.split()[1]) * 1024


def reset_peak(device: torch.device) -> None:
    """Forget the highest memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def serve(rank: int, name: str, work: Workload, world_size: int, folder: str, pipe: Connection, frugal: bool) -> None:
    """The life of one rank of a team: a step for every message, answered with its seconds, memory and loss."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # peers use names that torch has renamed
    if frugal:
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD_OPTION, MMAP_THRESHOLD_BYTES)
    try:
        backend = "cpu:gloo,cuda:nccl" if work.device_type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
        device = torch.device(work.device_type)
        mesh = build_mesh(Parallel(pp=1, dp=world_size, tp=1), device)
        before = resident_bytes(device, peak=False)
        step = CONTENDERS[name](work, mesh, device)
        gc.collect()
        reset_peak(device)
        while (number := pipe.recv()) is not None:
            pipe.send(timed_step(step, work, number, device, before))
        dist.destroy_process_group()
    except BaseException:
        pipe.send(traceback.format_exc())


def timed_step(step: Step, work: Workload, number: int, device: torch.device, before: int) -> Figures:
    """Train on the tokens of step `number`; `before` is this process's memory without the contender."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(number)
    shape = (world_size, work.sequences_per_rank, work.model.seq_length)
    tokens_BT = torch.randint(0, work.model.vocab_size, shape, generator=generator)[rank].to(device)
    dist.barrier()
    begin = time.perf_counter()
    loss = step(tokens_BT).detach().clone()
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    seconds = time.perf_counter() - begin
    dist.all_reduce(loss)
    peak, steady = (resident_bytes(device, peak) - before for peak in (True, False))
    return Figures(seconds, peak, steady, loss.item() / world_size)


class Team:
    """The processes of one contender.

    Raises:
        RuntimeError: a rank failed; with its traceback.
    """

    def __init__(self, name: str, work: Workload, world_size: int, frugal: bool = False):
        context = multiprocessing.get_context("fork" if work.device_type == "cpu" else "spawn")
        self.name, self.folder = name, tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, name, work, world_size, self.folder.name, theirs, frugal)
            self.processes.append(context.Process(target=serve, args=arguments, daemon=True))
            self.pipes.append(ours)
        for process in self.processes:
            process.start()

    def step(self, number: int) -> Figures:
        """Train one step: the slowest rank's time and the hungriest rank's memory."""
        for pipe in self.pipes:
            pipe.send(number)
        answers = [pipe.recv() for pipe in self.pipes]
        for answer in answers:
            if isinstance(answer, str):
                raise RuntimeError(f"{self.name} failed:\n{answer}")
        return Figures(*(max(values) for values in zip(*answers)))

    def leave(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()
        self.folder.cleanup()


def run() -> str:
    """Two ranks on CPU and, where there is a GPU, one rank on it: a Markdown table for each."""
    tables = ["Two ranks on CPU, 54.6M parameters, fp32:", table(CPU, world_size=2)]
    if torch.cuda.is_available():
        tables += ["One rank on the GPU, 162M parameters, bf16:", table(GPU, world_size=1)]
    return "\n\n".join(tables)


def table(work: Workload, world_size: int, names: list[str] | None = None) -> str:
    """Measure memory contender by contender, then time, in turns with the first; a Markdown table.

    Args:
        names: two contenders or more, all by default; the first is what the others are compared with.
    """
    names = names or list(CONTENDERS)
    memory: dict[str, Figures] = {}
    for name in names:
        team = Team(name, work, world_size, frugal=True)
        memory[name] = [team.step(number) for number in range(MEMORY_STEPS)][-1]
        team.leave()
    pairs = {name: in_turns((names[0], name), work, world_size) for name in names[1:]}
    first = [step for firsts, _ in pairs.values() for step in firsts]
    pairs = {names[0]: (first, first)} | pairs
    lines = [f"| | tokens/s | x {names[0]} | peak MiB | steady MiB | last loss |", "|---|---|---|---|---|---|"]
    for name, pair in pairs.items():
        reference, seconds = (statistics.median(figures.seconds for figures in steps) for steps in pair)
        figures = [
            f"{world_size * work.tokens_per_step / seconds:,.0f}",
            f"{reference / seconds:.2f}",
            f"{memory[name].peak_bytes / MIB:.0f}",
            f"{memory[name].steady_bytes / MIB:.0f}",
            f"{pair[1][-1].loss:.5f}",
        ]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines)


def in_turns(names: tuple[str, str], work: Workload, world_size: int) -> tuple[list[Figures], list[Figures]]:
    """Train two contenders step by step in turns; what their steps showed, but for the first, which allocates."""
    teams = Team(names[0], work, world_size), Team(names[1], work, world_size)
    rounds = [[team.step(number) for team in teams] for number in range(1 + work.steps)]
    for team in teams:
        team.leave()
    mine, theirs = zip(*rounds[1:])
    return list(mine), list(theirs)
