"""What `run.determinism` costs: the quickstart in each of its modes, on one rank and on two, ZeRO-1 and ZeRO-3.

The modes take turns step by step in the same processes, one thread each, so that a machine that slows down slows all of
them. Times are medians; a ratio is the median of the turns' ratios. Memory and traffic are counted, not sampled: all
that one step of a rank allocates, by `plan.ledger`.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from neox_native.config.check import require
from neox_native.config.load import CONFIGS_FOLDER, load
from neox_native.config.schema import Config
from neox_native.data.loader import StepBatch
from neox_native.engine.build import build_engine, build_model, build_step
from neox_native.engine.step import TrainStep
from neox_native.mesh import build_mesh
from neox_native.plan import costs
from neox_native.plan.dry_run import axes_of, run_step
from neox_native.plan.ledger import Ledger
from neox_native.train.start import choose_arithmetic
from tools.benchmarks.training import CPU, WARMUP_STEPS, batches, on_ranks

MODES = ("fast", "bitwise", "elastic")
REFERENCE = "bitwise"
LAYOUTS = {"1 rank": (1, 0), "2 ranks, ZeRO-1": (2, 1), "2 ranks, ZeRO-3": (2, 3)}
"""Name -> data-parallel ranks and ZeRO stage."""
HEADER = ("", "tokens/s", f"x {REFERENCE}", "CPU s per step", "peak MB per rank", "MB sent over dp", "closed form", "loss")


@dataclass(frozen=True)
class Figures:
    """What one rank, or all of them, showed of a mode."""

    seconds: list[float]
    """Of each turn."""
    cpu_seconds: list[float]
    """Those of them in which a core worked for the rank: what else the machine does is left out."""
    loss: float
    """Of the last turn."""
    peak_bytes: int
    sent_bytes: int
    """Over dp in a step, counted."""
    predicted_bytes: int
    """The closed form of that."""


def turn(config: Config, step: TrainStep, batch: StepBatch) -> tuple[float, float, float]:
    """One step of a mode: its seconds, CPU seconds, and loss."""
    choose_arithmetic(config.run, CPU)
    dist.barrier()
    begin = time.perf_counter(), time.process_time()
    result = step(batch, config.optimizer.lr)
    dist.barrier()
    end = time.perf_counter(), time.process_time()
    return end[0] - begin[0], end[1] - begin[1], step.losses.total(result.loss).item()


def measure(configs: dict[str, Config], turns: int) -> dict[str, Figures]:
    """Train every mode on this rank, in turns."""
    steps: dict[str, TrainStep] = {}
    shown: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in configs}
    some = next(iter(configs.values()))
    mesh = build_mesh(some.parallel, CPU)
    for mode, config in configs.items():
        choose_arithmetic(config.run, CPU)
        parts, optimizer = build_model(config, mesh, CPU)
        steps[mode] = build_step(config, mesh, CPU, build_engine(config, mesh, CPU, parts, optimizer), optimizer)
    for number, batch in enumerate(read := list(batches(some, WARMUP_STEPS + turns))):
        first = number % len(configs)
        for mode in (*list(configs)[first:], *list(configs)[:first]):
            shown[mode].append(turn(configs[mode], steps[mode], batch))
    figures = {}
    for mode, step in steps.items():
        choose_arithmetic(configs[mode].run, CPU)
        run_step(step, step.engine.parts.values(), read[-1], ledger := Ledger(axes_of(mesh)))
        seconds, cpu_seconds, losses = zip(*shown[mode])
        figures[mode] = Figures(
            seconds=list(seconds[WARMUP_STEPS:]),
            cpu_seconds=list(cpu_seconds[WARMUP_STEPS:]),
            loss=losses[-1],
            peak_bytes=max(peak.num_bytes for peak in ledger.peaks().values()),
            sent_bytes=ledger.totals.traffic["dp"].bytes,
            predicted_bytes=costs.traffic(configs[mode], 0)["dp"],
        )
    return figures


def together(ranks: list[Figures]) -> Figures:
    """Of all ranks: the slowest one's time, the most memory and traffic."""
    most = max(each.peak_bytes for each in ranks), max(each.sent_bytes for each in ranks)
    slowest, busiest = (
        [max(times) for times in zip(*(getattr(each, name) for each in ranks))] for name in ("seconds", "cpu_seconds")
    )
    return Figures(slowest, busiest, ranks[0].loss, *most, ranks[0].predicted_bytes)


def run(config_path: Path = CONFIGS_FOLDER / "quickstart.toml", turns: int = 15) -> str:
    """Measure each layout; a Markdown table."""
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for layout, (ranks, stage) in LAYOUTS.items():
        config = require(load(config_path, [f"--parallel.dp={ranks}", f"--parallel.zero_stage={stage}"]), ranks)
        tokens = config.training.global_batch_size * config.model.seq_length
        configs = {mode: replace(config, run=replace(config.run, determinism=mode)) for mode in MODES}
        answers = on_ranks(ranks, measure, configs, turns)
        found = {mode: together([answer[mode] for answer in answers]) for mode in MODES}
        for mode, figures in found.items():
            ratio = statistics.median(r / own for r, own in zip(found[REFERENCE].seconds, figures.seconds))
            cells = [
                f"{layout}, {mode}",
                f"{tokens / statistics.median(figures.seconds):,.0f}",
                f"{ratio:.2f}",
                f"{statistics.median(figures.cpu_seconds):.3f}",
                *(f"{number / 1e6:.3f}" for number in (figures.peak_bytes, figures.sent_bytes, figures.predicted_bytes)),
                f"{figures.loss:.12f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
