"""This loop beside plain `DistributedDataParallel`, and one process beside tp 2 and pp 2: same model, data and steps.

Every contender trains in fresh processes, so that memory is its own; rounds alternate, so that a machine that slows
down slows all of them; figures are medians over the steps of all rounds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from neox_native.config.check import require
from neox_native.config.load import CONFIGS_FOLDER, load
from neox_native.config.schema import Config, Evaluation
from neox_native.data.build import build_data
from neox_native.data.loader import StepBatch, build_loader
from neox_native.engine.build import build_engine, build_model
from neox_native.engine.step import Losses, TrainStep
from neox_native.launch import Ranks
from neox_native.mesh import build_mesh
from neox_native.metrics.throughput import peak_memory_bytes
from neox_native.model.transformer import Transformer, cards
from neox_native.optim.groups import optimizer_factory
from neox_native.plan import costs
from neox_native.plan.ledger import Ledger
from neox_native.train.start import choose_arithmetic

CPU = torch.device("cpu")
WARMUP_STEPS = 3
DDP = "DistributedDataParallel, 2 ranks"


@dataclass(frozen=True)
class Figures:
    """What one rank measured."""

    step_seconds: list[float]
    peak_bytes: int
    loss: float
    sent_bytes: int
    """Sent by this rank in one more step, counted."""
    predicted_bytes: int
    """The closed form of that."""


def our_step(config: Config) -> Callable[[StepBatch], torch.Tensor]:
    """A step of this project's loop; returns this rank's share of the loss."""
    mesh = build_mesh(config.parallel, CPU)
    parts, optimizer = build_model(config, mesh, CPU)
    engine = build_engine(config, mesh, CPU, parts, optimizer)
    step = TrainStep(engine, optimizer, Losses(mesh, CPU), config.training.clip_grad_norm)
    return lambda batch: step(batch, config.optimizer.lr).loss


def ddp_step(config: Config) -> Callable[[StepBatch], torch.Tensor]:
    """The usual data-parallel loop: accumulate without synchronising, clip, update."""
    model = Transformer(config.model, seed=config.run.seed)
    known = cards(config.model)
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[0 if known[model.global_name(name)].decay else 1]["params"].append(parameter)
    optimizer = optimizer_factory(config.optimizer)(groups)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    clip = config.training.clip_grad_norm

    def step(batch: StepBatch) -> torch.Tensor:
        tokens, targets = batch.model_fields["tokens_BT"], batch.model_fields["targets_BT"]
        total, count = torch.zeros(()), len(tokens)
        for index in range(count):
            last = index == count - 1
            with contextlib.nullcontext() if last else wrapped.no_sync():
                logits = wrapped(tokens[index])
                loss = F.cross_entropy(logits.flatten(0, 1), targets[index].flatten()) / count
                loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        return total / config.parallel.dp

    return step


def batches(config: Config, steps: int) -> Iterator[StepBatch]:
    """What training would read."""
    training, ranks = replace(config.training, steps=steps), Ranks(lambda message: None)
    data = build_data(config.data, config.model, training, Evaluation(every=0), config.run.seed, ranks)
    tp_and_pp = config.parallel.tp * config.parallel.pp
    dp_rank = dist.get_rank() // config.parallel.tp % config.parallel.dp if tp_and_pp > 1 else dist.get_rank()
    return build_loader(
        data.train, consumed_samples=0, global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size, dp_rank=dp_rank, dp_size=config.parallel.dp, stop_after_steps=steps,
    )  # fmt: skip


def measure(config: Config, with_ddp: bool, steps: int) -> Figures:
    """Train on this rank."""
    choose_arithmetic(config.run, CPU)
    step = ddp_step(config) if with_ddp else our_step(config)
    seconds, loss = [], torch.zeros(())
    for batch in batches(config, WARMUP_STEPS + steps):
        dist.barrier()
        begin = time.perf_counter()
        loss = step(batch).double()
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    dist.all_reduce(loss)
    peak_bytes, sent, predicted = peak_memory_bytes(CPU), 0, 0
    if not with_ddp:
        mesh_ranks = (config.parallel.pp, config.parallel.dp, config.parallel.tp)
        pp_rank = dist.get_rank() // (mesh_ranks[1] * mesh_ranks[2])
        predicted = sum(costs.traffic(config, pp_rank).values()) + costs.point_to_point_bytes(config, pp_rank)
        with Ledger(defaultdict(lambda: "any")) as ledger:
            step(next(iter(batches(config, 1))))
        sent = ledger.totals.sent_bytes + sum(traffic.bytes for traffic in ledger.totals.traffic.values())
    return Figures(seconds[WARMUP_STEPS:], peak_bytes, loss.item() / config.parallel.tp, sent, predicted)


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results of `function(*arguments)` on forked gloo ranks, in no order.

    Raises:
        RuntimeError: a rank failed; with its traceback.
    """
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def live(rank: int, folder: str) -> None:
        torch.set_num_threads(1)
        try:
            dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
            results.put(function(*arguments))
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            results.put(traceback.format_exc())

    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=live, args=(rank, folder), daemon=True) for rank in range(world_size)]
        for process in processes:
            process.start()
        answers = [results.get() for _ in processes]
        for process in processes:
            process.join(timeout=60)
    for answer in answers:
        if isinstance(answer, str):
            raise RuntimeError(answer)
    return answers


CONTENDERS: dict[str, list[str]] = {
    "one process": ["--parallel.dp=1"],
    DDP: ["--parallel.dp=2"],
    "dp 2": ["--parallel.dp=2"],
    "dp 2, bitwise": ["--parallel.dp=2", "--run.determinism=bitwise"],
    "tp 2": ["--parallel.dp=1", "--parallel.tp=2"],
    "tp 2, sequence parallel": ["--parallel.dp=1", "--parallel.tp=2", "--parallel.sequence_parallel=true"],
    "pp 2, 1f1b": ["--parallel.dp=1", "--parallel.pp=2"],
}
"""Name -> settings."""


def run(config_path: Path = CONFIGS_FOLDER / "quickstart.toml", steps: int = 10, rounds: int = 3) -> str:
    """Measure the contenders in turn; return a Markdown table."""
    found: dict[str, list[list[Figures]]] = {name: [] for name in CONTENDERS}
    tokens = 0
    for _ in range(rounds):
        for name, settings in CONTENDERS.items():
            config = load(config_path, settings)
            world_size = config.parallel.pp * config.parallel.dp * config.parallel.tp
            tokens = config.training.global_batch_size * config.model.seq_length
            found[name].append(on_ranks(world_size, measure, require(config, world_size), name == DDP, steps))
    medians = {
        name: statistics.median(max(times) for ranks in rounds for times in zip(*(rank.step_seconds for rank in ranks)))
        for name, rounds in found.items()
    }
    reference = medians[DDP]
    lines = [
        "| | tokens/s | x DDP | peak MB per rank | MB sent per rank and step | closed form | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rounds in found.items():
        peak = max(rank.peak_bytes for ranks in rounds for rank in ranks) / 1e6
        loss, sent, predicted = (
            max(getattr(rank, what) for rank in rounds[0]) for what in ("loss", "sent_bytes", "predicted_bytes")
        )
        volume = "| |" if name == DDP else f"{sent / 1e6:.3f} | {predicted / 1e6:.3f} |"
        lines.append(
            f"| {name} | {tokens / medians[name]:,.0f} | {reference / medians[name]:.2f} | {peak:.0f} | {volume} {loss:.6f} |"
        )
    return "\n".join(lines)
