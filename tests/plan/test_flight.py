"""Who is in flight when: the closed forms against the order in which torch will run the passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest

from neox_native.config.schema import Parallel
from neox_native.parallel.timeline import order_of
from neox_native.plan.flight import Moment, moments

SCHEDULES = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("looped_bfs", 2),
    ("interleaved_1f1b", 2),
    ("interleaved_1f1b", 3),
    ("interleaved_zero_bubble", 2),
    ("interleaved_zero_bubble", 3),
]


def played(schedule: str, pp: int, virtual: int, microbatches: int, rank: int) -> Iterator[Moment]:
    """Every backward pass of a rank in torch's order."""
    actions = order_of(schedule, pp, virtual, microbatches)[rank]
    split = any(action.kind == "I" for action in actions)
    turns = {stage: turn for turn, stage in enumerate(sorted({action.stage for action in actions}))}
    held, waiting, done = ([0] * len(turns) for _ in range(3))
    for action in actions:
        turn = turns[action.stage]
        held[turn] += action.kind == "F"
        if action.kind in "BI":
            halved = tuple(done) if split else (0,) * len(done)
            yield Moment(turn, tuple(held), tuple(waiting), halved, tuple(number > 0 for number in done))
            done[turn] += 1
        held[turn] -= action.kind in "BW"
        waiting[turn] += (action.kind == "I") - (action.kind == "W")


def covers(one: Moment, other: Moment) -> bool:
    """Whether `one` has as much of everything."""
    mine, its = (moment.held + moment.waiting + moment.halved + moment.reduced for moment in (one, other))
    return one.turn == other.turn and all(more >= less for more, less in zip(mine, its))


@pytest.mark.parametrize("schedule, virtual", SCHEDULES)
@pytest.mark.parametrize("pp, microbatches", [(2, 2), (2, 6), (3, 3), (3, 9), (4, 4), (4, 8), (4, 16)])
def test_moments_are_those_of_the_schedule(schedule: str, virtual: int, pp: int, microbatches: int) -> None:
    for rank in range(pp):
        predicted = moments(Parallel(pp=pp, pipeline_schedule=schedule, virtual_stages=virtual), microbatches, rank)
        real = set(played(schedule, pp, virtual, microbatches, rank))
        assert set(predicted) <= real
        assert all(any(covers(one, other) for one in predicted) for other in real)


@pytest.mark.parametrize("pp, microbatches", [(2, 4), (2, 8), (4, 8), (4, 16)])
def test_moments_are_those_of_a_v(pp: int, microbatches: int) -> None:
    """Whose ZeRO stages are 0 and 1, to which it is nothing whether gradients were reduced."""
    for rank in range(pp):
        predicted = moments(Parallel(pp=pp, pipeline_schedule="zbv", virtual_stages=2), microbatches, rank)
        real = {replace(moment, reduced=(True, True)) for moment in played("zbv", pp, 2, microbatches, rank)}
        assert set(predicted) <= real
        for turn in range(2):
            assert max_of(predicted, turn) == max_of(real, turn)


def max_of(found: Iterable[Moment], turn: int) -> tuple[int, int]:
    """Most pairs in flight at a stage's backward passes, and most that wait for weight halves."""
    of_turn = [moment for moment in found if moment.turn == turn]
    most = max((sum(moment.held) for moment in of_turn), default=0)
    return most, max((sum(moment.waiting) for moment in of_turn), default=0)


def test_a_moment_that_holds_less_of_everything_is_left_out() -> None:
    found = moments(Parallel(pp=2, pipeline_schedule="interleaved_1f1b", virtual_stages=2), 64, 0)
    assert len(found) < 8 and not any(one != other and covers(one, other) for one in found for other in found)
