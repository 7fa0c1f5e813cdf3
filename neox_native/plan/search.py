"""Which layout: enumerate, drop what cannot work or does not fit, predict the rest, and say why each loser lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from neox_native.config.check import problems, require_some_layout
from neox_native.config.schema import Compile, Config
from neox_native.errors import UserError
from neox_native.plan.memory import peak_bytes
from neox_native.plan.speed import Machine, StepTime, step_time
from neox_native.units import share_of_step, size

MEMORY_SHARE = 0.80
"""Predictions below this share of the memory never ran out in 454 published runs."""
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
SCHEDULES = (
    ("1f1b", 1),
    ("gpipe", 1),
    ("interleaved_1f1b", 2),
    ("interleaved_1f1b", 4),
    ("looped_bfs", 2),
    ("interleaved_zero_bubble", 2),
    ("zbv", 2),
)
"""Schedule and virtual stages."""
FORGETS = (("full", 1), ("none", 1), ("selective", 2), ("selective", 1), ("full", 2))
"""Activation checkpointing, and of every so many-th block: the most, and the others beginning with the least."""


@dataclass(frozen=True)
class Candidate:
    """One layout that can work."""

    config: Config
    peak_bytes: int
    """Memory of the rank that needs most."""
    time: StepTime | None
    """None where it does not fit."""

    @property
    def speed(self) -> float:
        """Tokens per second and GPU; 0 where it does not fit."""
        return self.time.tokens_per_second_per_gpu if self.time else 0.0

    @property
    def layout(self) -> str:
        """The layout in words."""
        parallel, training = self.config.parallel, self.config.training
        words = [f"pp {parallel.pp} dp {parallel.dp} tp {parallel.tp}"]
        words += ["sp"] if parallel.sequence_parallel else []
        words += ["async"] if parallel.async_tp and parallel.tp > 1 else []
        inside = f" inside {parallel.zero_shard_size}" if parallel.zero_shard_size else ""
        words += [f"zero {parallel.zero_stage}{inside}", f"micro {training.micro_batch_size}"]
        if parallel.pp > 1:
            words.append(parallel.pipeline_schedule + (f" x{parallel.virtual_stages}" if parallel.virtual_stages > 1 else ""))
        forgotten = forgets(self.config)
        words += ["compiled"] if self.config.compile.on else []
        return " ".join(words) + ("" if forgotten == "none" else f" recompute {forgotten}")


def forgets(config: Config) -> str:
    """What its blocks recompute, in words."""
    kind, every = config.training.activation_checkpointing, config.training.recompute_every
    return kind if kind == "none" or every == 1 else f"{kind} every {every}"


def layouts(config: Config, gpus: int, gpus_per_node: int) -> Iterator[Config]:
    """Every layout of `gpus` devices that passes the config's own rules, compiled where the config lets it be. Tensor parallelism
    stays inside a node, and so do ZeRO's groups where it has any."""
    compiled = (True, False) if config.compile.enabled == "auto" else (config.compile.on,)
    degrees = [number for number in range(1, gpus + 1) if gpus % number == 0]
    tps = [degree for degree in degrees if gpus_per_node % degree == 0]
    for pp, tp in itertools.product(degrees, tps):
        if gpus % (pp * tp) == 0 and pp <= config.model.num_layers:
            for parallel, training in _choices(pp, gpus // (pp * tp), tp, gpus_per_node // tp):
                changed = replace(
                    config,
                    parallel=replace(config.parallel, pp=pp, dp=gpus // (pp * tp), tp=tp, stage_layers=[], **parallel),
                    training=replace(config.training, **training),
                )
                ways = (replace(changed, compile=Compile(on)) for on in compiled)
                yield from itertools.islice((way for way in ways if not problems(way, gpus)), 1)


def _choices(pp: int, dp: int, tp: int, neighbours: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Settings of [parallel] and [training] that make a difference on a mesh of which a node holds so many neighbours on dp."""
    sequence = (False, True) if tp > 1 else (False,)
    groups = (0, neighbours) if 1 < neighbours < dp else (0,)
    stages = [(0, 0), *itertools.product((1, 2, 3) if dp > 1 else (), groups)]
    schedules = SCHEDULES if pp > 1 else SCHEDULES[:1]
    choices = itertools.product(sequence, stages, MICRO_BATCH_SIZES, schedules, FORGETS)
    for cut, (zero, group), micro, (schedule, virtual), (recompute, every) in choices:
        layout = {"sequence_parallel": cut, "zero_stage": zero, "zero_shard_size": group}
        layout |= {"pipeline_schedule": schedule, "virtual_stages": virtual}
        yield layout, {"micro_batch_size": micro, "activation_checkpointing": recompute, "recompute_every": every}


def search(config: Config, gpus: int, machine: Machine) -> list[Candidate]:
    """All layouts that can work, the fastest first, those that do not fit at the end, the nearest first. Of what a layout may
    recompute, all are there up to the first that fits, and full recomputation.

    Raises:
        UserError: none fits; the message says what the nearest lacks. Or the config cannot work in any.
    """
    require_some_layout(config)
    limit = MEMORY_SHARE * machine.gpu.memory_bytes
    found, settled = [], None
    for layout in layouts(config, gpus, machine.gpus_per_node):
        place = layout.parallel, layout.training.micro_batch_size
        if place == settled:
            continue
        peak = peak_bytes(layout)
        found.append(Candidate(layout, peak, step_time(layout, machine) if peak <= limit else None))
        # What recomputes more than what fits is slower; where full recomputation does not fit, nothing does.
        settled = place if (peak <= limit) != (forgets(layout) == "full") else None
    if not found:
        raise UserError(
            f"no layout of {gpus} GPUs divides the model and training.global_batch_size = "
            f"{config.training.global_batch_size}; change --gpus or the batch size."
        )
    found.sort(key=lambda candidate: (-candidate.speed, candidate.peak_bytes))
    if found[0].time is None:
        nearest, share = found[0], f"{MEMORY_SHARE:.0%} of {size(machine.gpu.memory_bytes)}"
        raise UserError(
            f"nothing fits on {gpus} {machine.gpu.name}: the nearest, {nearest.layout}, needs "
            f"{size(nearest.peak_bytes)} per GPU, {size(nearest.peak_bytes - limit)} more than {share}; "
            "take more GPUs, one with more memory, or a smaller model.seq_length."
        )
    return found


def outlook(config: Config, machine: Machine) -> str:
    """What a resolved config is to a machine, in a line: memory, time and what of the peak that is."""
    it = Candidate(config, peak_bytes(config), step_time(config, machine))
    assert it.time is not None
    peak, memory = size(it.peak_bytes), size(machine.gpu.memory_bytes)
    return f"{peak} of {memory} per GPU, {it.time.seconds:.3g} s a step, {it.time.mfu:.1%} MFU ({it.layout})"


def table(candidates: list[Candidate]) -> str:
    """The layouts as a table."""
    header = ("layout", "memory", "tokens/s/GPU", "MFU", "bubble", "exposed communication")
    rows = [header]
    for candidate in candidates:
        time = candidate.time
        assert time is not None
        rows.append(
            (
                candidate.layout,
                size(candidate.peak_bytes),
                f"{time.tokens_per_second_per_gpu:,.0f}",
                f"{time.mfu:.1%}",
                f"{share_of_step(time.bubble_fraction):.1%} of the step",
                f"{time.exposed / time.seconds:.1%} of the step",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


CHOICES: dict[str, Callable[[Config], object]] = {
    "pp": lambda config: config.parallel.pp,
    "tp": lambda config: config.parallel.tp,
    "zero": lambda config: config.parallel.zero_stage,
    "zero shards": lambda config: (
        ("inside a node" if config.parallel.zero_shard_size else "over all of dp") if config.parallel.zero_stage else None
    ),
    "sequence parallelism": lambda config: config.parallel.sequence_parallel if config.parallel.tp > 1 else None,
    "micro batch": lambda config: config.training.micro_batch_size,
    "schedule": lambda config: (
        f"{config.parallel.pipeline_schedule} x{config.parallel.virtual_stages}" if config.parallel.pp > 1 else None
    ),
    "activation checkpointing": forgets,
    "compiled": lambda config: config.compile.on,
}


def reasons(candidates: list[Candidate], machine: Machine) -> list[str]:
    """One sentence for each value of each choice that the best layout does not have."""
    best, sentences = candidates[0], []
    for name, choice in CHOICES.items():
        for value in sorted({choice(candidate.config) for candidate in candidates} - {None, choice(best.config)}, key=str):
            rivals = [candidate for candidate in candidates if choice(candidate.config) == value]
            sentences.append(f"{name} {value}: {_why(rivals[0], best, machine)}")
    return sentences


def _why(rival: Candidate, best: Candidate, machine: Machine) -> str:
    """Why the best layout with some choice loses: it is slower, or even the nearest does not fit."""
    if rival.time is None or best.time is None:
        over = rival.peak_bytes - MEMORY_SHARE * machine.gpu.memory_bytes
        return f"never fits; the nearest, {rival.layout}, is {size(over)} over."
    slower = 1.0 - rival.speed / best.speed
    mean = [sum(time.forward + time.backward) / len(time.forward) for time in (rival.time, best.time)]
    microbatches = [c.config.training.num_microbatches(c.config.parallel.dp) for c in (rival, best)]
    idle = [time.bubble_fraction * each * m for time, each, m in zip((rival.time, best.time), mean, microbatches)]
    parts = {
        "more exposed tensor-parallel traffic": rival.time.tensor_parallel - best.time.tensor_parallel,
        "more exposed traffic over dp": rival.time.data_parallel - best.time.data_parallel,
        "more sends between stages": rival.time.pipeline - best.time.pipeline,
        "a larger bubble": idle[0] - idle[1],
        "a longer update": rival.time.update - best.time.update,
    }
    rest = rival.time.seconds - best.time.seconds - sum(parts.values())
    parts["more computation (recomputation, smaller matrix products, uneven stages)"] = rest
    reason = max(parts, key=lambda part: parts[part])
    if slower < 0.005:
        return f"as fast to half a percent ({rival.layout})."
    return f"{slower:.1%} slower at its best, {rival.layout}: {reason}."
