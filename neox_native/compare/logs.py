"""What two runs logged, step by step: every number that belongs to the training, no time, throughput or memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neox_native.metrics.writers import EVENTS, METRICS, read_log

OF_THE_MACHINE = {"step", "tokens_per_second", "step_seconds", "tflops_per_device", "mfu", "mfu_causal", "peak_memory_bytes"}
"""Fields of a logged step that are not compared."""
EVENT_FIELDS = {"evaluation": "loss", "checkpoint": "state_hash", "bad step": "sample_ids", "empty step": "message"}
"""What is compared of each kind of event."""
NEVER_CHOSEN = ("bad step", "empty step")
"""Kinds that no setting makes rarer: where one run alone has one, the runs differ."""

Log = dict[int, dict[str, Any]]
"""Values by step and name: "loss" of the step, or "evaluation loss" of an event."""


@dataclass(frozen=True)
class LogDifference:
    """A value that two runs logged otherwise."""

    name: str
    step: int
    """The first at which it differs."""
    values: tuple[Any, Any]
    """There."""
    relative: float | None
    """Their difference over the larger of their sizes; None where they are no numbers."""
    num_steps: int
    """How often it differs."""
    largest_relative: float | None
    """Of all steps."""

    def __str__(self) -> str:
        first, second = (f"{value!s:.60}" for value in self.values)
        apart = "" if self.relative is None else f", {self.relative:.2g} relative"
        most = "" if self.largest_relative is None else f" ({self.largest_relative:.2g} at most)"
        more = f"; at {self.num_steps:,} steps{most}" if self.num_steps > 1 else ""
        return f"step {self.step}: {self.name} {first} | {second}{apart}{more}"

    def as_json(self) -> dict[str, Any]:
        """Its fields, the values as a list."""
        return asdict(self)


def read(run: Path) -> Log:
    """What a run's folder tells; nothing where it has no logs."""
    log: Log = {}
    for said in read_log(run / METRICS):
        if type(step := said.get("step")) is int:
            log[step] = {name: value for name, value in said.items() if name not in OF_THE_MACHINE}
    for said in read_log(run / EVENTS):
        kind = said.get("kind")
        field = EVENT_FIELDS.get(kind) if isinstance(kind, str) else None
        if field in said and type(step := said.get("step")) is int:
            log.setdefault(step, {})[f"{kind} {field}"] = said[field]
    return log


def compare(first: Log, second: Log) -> tuple[int, list[LogDifference]]:
    """How many steps both tell of, and the values that differ, the first to do so first.

    A value that one of them lacks is not compared: the runs may log or evaluate at other steps. But an update that one alone
    skipped is a difference up to the last step that both have come to.
    """
    last = min((max(log, default=0) for log in (first, second)))
    found: dict[str, list[tuple[int, tuple[Any, Any]]]] = {}
    num_steps = 0
    for step in sorted(first.keys() | second.keys()):
        mine, other = first.get(step, {}), second.get(step, {})
        common = [name for name in mine if name in other]
        num_steps += bool(common)
        if step <= last:
            common += [name for name in mine.keys() ^ other.keys() if name.startswith(NEVER_CHOSEN)]
        for name in common:
            if mine.get(name) != other.get(name):
                found.setdefault(name, []).append((step, (mine.get(name), other.get(name))))
    differences = [_difference(name, places) for name, places in found.items()]
    return num_steps, sorted(differences, key=lambda difference: difference.step)


def _difference(name: str, places: list[tuple[int, tuple[Any, Any]]]) -> LogDifference:
    relatives = [relative for _, values in places if (relative := _relative(*values)) is not None]
    step, values = places[0]
    return LogDifference(name, step, values, _relative(*values), len(places), max(relatives, default=None))


def _relative(first: Any, second: Any) -> float | None:
    if not all(isinstance(value, int | float) for value in (first, second)):
        return None
    return abs(first - second) / max(abs(first), abs(second))
