"""What a pipeline schedule does when: the order that torch's schedules prescribe, laid out in time.

An action is the forward (F), the full backward (B), or the input half (I) or weight half (W) of a backward pass of one
microbatch on one stage. Its start is the latest of: its rank is free; the neighbouring stage has delivered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch.distributed.pipelining.schedules import get_schedule_class

from neox_native.parallel.pipeline import SCHEDULES

DURATIONS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
"""Time of each kind where nothing is measured: a backward pass has two matrix products for each of the forward's."""


class Action(NamedTuple):
    """One stage's work on one microbatch."""

    stage: int
    kind: str
    microbatch: int


class Span(NamedTuple):
    """An action in time."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """All ranks' spans of one step."""

    ranks: list[list[Span]]

    @property
    def duration(self) -> float:
        """Time of the whole step."""
        return max(span.end for spans in self.ranks for span in spans)

    def busy(self, rank: int) -> float:
        """Time in which a rank computes."""
        return sum(span.end - span.start for span in self.ranks[rank])

    @property
    def bubble_fraction(self) -> float:
        """Idle time over all ranks as a fraction of their compute time: (p - 1) / m for GPipe and 1F1B
        (Narayanan et al. 2021 §2.2)."""
        busy = sum(self.busy(rank) for rank in range(len(self.ranks)))
        return self.duration * len(self.ranks) / busy - 1.0

    def peak_in_flight(self, rank: int) -> int:
        """Largest number of (stage, microbatch) pairs whose activations a rank holds at once: from their forward to
        the end of their backward, or of its weight half."""
        done = "W" if any(span.action.kind == "W" for span in self.ranks[rank]) else "B"
        held, peak = set(), 0
        for span in self.ranks[rank]:
            pair = (span.action.stage, span.action.microbatch)
            if span.action.kind == "F":
                held.add(pair)
            peak = max(peak, len(held))
            if span.action.kind in (done, "B"):
                held.discard(pair)
        return peak


def torch_order(schedule: str, pp: int, virtual_stages: int, num_microbatches: int) -> list[list[Action]]:
    """Every rank's actions in the order in which torch will run them.

    The one place that uses torch's private listing of a schedule. That listing numbers the last rank's forwards of
    1F1B from 1; every rank takes the microbatches of a stage in order, so counting them gives the true numbers.
    """
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    listing = get_schedule_ops(get_schedule_class(SCHEDULES[schedule]), pp, num_microbatches, virtual_stages)
    kinds = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    order = []
    for rank in listing:
        counts: Counter[int] = Counter()
        actions = []
        for entry in rank:
            kind = kinds.get(entry.computation_type.name) if entry is not None else None
            if kind is not None:
                number = counts[entry.stage_index] if kind == "F" else entry.microbatch_index
                counts[entry.stage_index] += kind == "F"
                actions.append(Action(entry.stage_index, kind, number))
        order.append(actions)
    return order


def needs(action: Action, num_stages: int) -> list[tuple[Action, ...]]:
    """What must be done before an action: for each entry, one of its alternatives."""
    stage, kind, microbatch = action
    if kind == "F":
        return [(Action(stage - 1, "F", microbatch),)] if stage > 0 else []
    if kind == "W":
        return [(Action(stage, "I", microbatch),)]
    required = [(Action(stage, "F", microbatch),)]
    if stage + 1 < num_stages:
        required.append((Action(stage + 1, "B", microbatch), Action(stage + 1, "I", microbatch)))
    return required


def lay_out(order: Sequence[Sequence[Action]], duration: Callable[[Action], float]) -> Timeline:
    """Start every action as early as its rank and its needs allow.

    Args:
        duration: time of an action.
    """
    num_stages = 1 + max(action.stage for rank in order for action in rank)
    ends: dict[Action, float] = {}
    ranks: list[list[Span]] = [[] for _ in order]
    remaining = sum(len(rank) for rank in order)
    while remaining:
        before = remaining
        for rank, actions in enumerate(order):
            while len(ranks[rank]) < len(actions):
                action = actions[len(ranks[rank])]
                ready = [
                    next((ends[option] for option in options if option in ends), None)
                    for options in needs(action, num_stages)
                ]
                if None in ready:
                    break
                free = ranks[rank][-1].end if ranks[rank] else 0.0
                start = max([free, *ready])
                ends[action] = start + duration(action)
                ranks[rank].append(Span(action, start, ends[action]))
                remaining -= 1
        assert remaining < before, "the schedule waits for itself"
    return Timeline(ranks)


def order_of(schedule: str, pp: int, virtual_stages: int, num_microbatches: int) -> list[list[Action]]:
    """Every rank's actions in order; without a pipeline, one rank that never waits."""
    if pp == 1:
        return [[Action(0, kind, m) for m in range(num_microbatches) for kind in "FB"]]
    return torch_order(schedule, pp, virtual_stages, num_microbatches)


def timeline(schedule: str, pp: int, virtual_stages: int, num_microbatches: int) -> Timeline:
    """The schedule of a run in units of one stage's forward pass, which takes 1 / virtual_stages, because each of a rank's
    stages is that much smaller."""
    order = order_of(schedule, pp, virtual_stages, num_microbatches)
    return lay_out(order, lambda action: DURATIONS[action.kind] / virtual_stages)
