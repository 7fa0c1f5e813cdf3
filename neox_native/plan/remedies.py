"""What would make a run fit that has run out of memory: settings to change, by the closed forms. Pure arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from neox_native.config.check import problems
from neox_native.config.layout_rules import in_use
from neox_native.config.schema import Config
from neox_native.config.settings import SETTINGS
from neox_native.config.values import to_toml
from neox_native.plan.hardware import gpu_of
from neox_native.plan.memory import peak_bytes
from neox_native.plan.speed import Machine, step_time

Changes = dict[str, Any]
"""New values of settings by their names."""


@dataclass(frozen=True)
class Remedy:
    """Changes with which a run needs less memory."""

    changes: Changes
    peak_bytes: int
    """Most memory on any rank, as predicted."""

    def __str__(self) -> str:
        return " ".join(f"--{name}={value if isinstance(value, str) else to_toml(value)}" for name, value in self.changes.items())


def remedies(config: Config, limit: float, device_name: str, count: int = 3) -> tuple[list[Remedy], Remedy | None]:
    """The settings that bring the busiest rank below `limit` bytes, each at the mildest value that does; pairs of settings
    where fewer than `count` do alone. Single ones first, of each sort the fastest first, on the same number of ranks.

    Args:
        config: resolved, with layer kinds that state their costs.
        device_name: as torch gives it; where it is not known, speeds are compared on an H100.

    Returns:
        at most `count` of them; and of all that was tried what needs least, None where nothing could be tried.
    """
    knobs, machine = _knobs(config), Machine(gpu_of(device_name))
    tried: list[Remedy] = []
    found: dict[tuple[str, ...], Remedy] = {}
    for size in (1, 2):
        for names in itertools.combinations(knobs, size) if len(found) < count else ():
            for remedy in _changed(config, [knobs[name] for name in names]):
                tried.append(remedy)
                if remedy.peak_bytes <= limit:
                    found[names] = remedy
                    break
        for (name,) in list(found) if size == 1 else ():  # in a pair, what does not do alone
            knobs[name] = list(itertools.takewhile(lambda each: each[name] != found[name,].changes[name], knobs[name]))
    seconds = {names: step_time(with_changes(config, remedy.changes), machine).seconds for names, remedy in found.items()}
    order = sorted(found, key=lambda names: (len(names), seconds[names]))
    return [found[names] for names in order[:count]], min(tried, key=lambda remedy: remedy.peak_bytes, default=None)


def with_changes(config: Config, changes: Changes) -> Config:
    """The config with other values of some settings."""
    for dotted, value in changes.items():
        setting = SETTINGS[dotted]
        section = replace(getattr(config, setting.section), **{setting.name: value})
        config = replace(config, **{setting.section: section})
    return config


def _changed(config: Config, knobs: Sequence[list[Changes]]) -> Iterator[Remedy]:
    """What the knobs make of a config, in any combination that can work; the mildest first."""
    parallel = config.parallel
    ranks = parallel.pp * parallel.dp * parallel.tp
    for choice in itertools.product(*knobs):
        changes = {name: value for each in choice for name, value in each.items()}
        if {"parallel.tp", "parallel.pp"} & set(changes):
            changes["parallel.dp"] = ranks // (changes.get("parallel.pp", parallel.pp) * changes.get("parallel.tp", parallel.tp))
        candidate = with_changes(config, changes)
        if candidate.parallel.dp > 0 and not problems(candidate, ranks):
            yield Remedy(changes, peak_bytes(replace(candidate, parallel=in_use(candidate.parallel))))


def _knobs(config: Config) -> dict[str, list[Changes]]:
    """What can be changed, each with the values that need less memory, the mildest first. Tensor parallelism stays in a node."""
    parallel, training = config.parallel, config.training
    micro, ranks = training.micro_batch_size, parallel.pp * parallel.dp * parallel.tp
    doubled = [1 << power for power in range(1, ranks.bit_length())]
    recomputation = SETTINGS["training.activation_checkpointing"]
    kinds = get_args(recomputation.annotation)  # each forgets more than the one before
    values: dict[str, list[Any]] = {
        "parallel.zero_stage": [stage for stage in (1, 2, 3) if stage > parallel.zero_stage and parallel.dp > 1],
        "parallel.zero_shard_size": [0] if parallel.zero_shard_size else [],
        "training.micro_batch_size": [size for size in range(micro - 1, 0, -1) if micro % size == 0],
        recomputation.dotted: list(kinds[kinds.index(training.activation_checkpointing) + 1 :]),
        "training.recompute_every": [1] if training.recompute_every > 1 and training.activation_checkpointing != "none" else [],
        "parallel.sequence_parallel": [True] if parallel.tp > 1 and not parallel.sequence_parallel else [],
        "parallel.tp": [degree for degree in doubled if parallel.tp < degree <= Machine.gpus_per_node],
        "parallel.pp": [degree for degree in doubled if parallel.pp < degree],
        "training.precision": ["bf16"] if training.precision == "fp32" else [],
    }
    return {name: [{name: value} for value in choices] for name, choices in values.items() if choices}
