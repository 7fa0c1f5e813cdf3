"""Which microbatches a pipeline rank holds while one of its backward passes runs. Pure arithmetic.

[Note: turns] A rank's stages take turns. In a looped schedule the forward passes come in rounds: R microbatches of its
first stage, R of its second, and so on, then the next R of the first; the backward passes do the same from its last
stage on. After w forward passes of warmup, forward and backward alternate. The numbers of passes done
then tell which microbatches are in flight:

    schedule                 R                     w                               source
    gpipe, looped_bfs        m                     v m                             Huang et al. 2019; Lamy-Poirier 2023
    1f1b                     m                     p - 1 - r                       Narayanan et al. 2021 §2.2
    interleaved_1f1b         m // max(1, m // p)   (v - 1) R + 2 (p - 1 - r)       ibid.
    interleaved_zero_bubble  the same              (v - 1) R + (p - 1 - r)         Qi et al. 2023 §3

In the last, weight halves come r backward passes later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from neox_native.config.schema import Parallel

ALL_FORWARD_FIRST = ("gpipe", "looped_bfs")


@dataclass(frozen=True)
class Moment:
    """A backward pass under way. Tuples have an entry for each of the rank's stages."""

    turn: int
    """Which of the rank's stages runs it."""
    held: tuple[int, ...]
    """Microbatches whose activations are there, the pass's own included."""
    waiting: tuple[int, ...]
    """Those of them whose backward pass has only its weight half before it."""
    halved: tuple[int, ...]
    """Input halves of backward passes that are over in this step; 0 in schedules that do not split them."""
    reduced: tuple[bool, ...]
    """Whether an earlier backward pass of the stage has delivered gradients in this step."""


def moments(parallel: Parallel, num_microbatches: int, pp_rank: int) -> tuple[Moment, ...]:
    """The moments of a step at which pipeline rank `pp_rank` may hold most."""
    p, v = parallel.pp, parallel.virtual_stages
    return _moments(parallel.pipeline_schedule, p, v, num_microbatches, pp_rank)


@cache  # a search asks for few schedules very often
def _moments(schedule: str, p: int, v: int, m: int, rank: int) -> tuple[Moment, ...]:
    if p == 1:
        return (Moment(0, (1,), (0,), (0,), (m > 1,)),)
    return tuple(_most(_v_shaped(p, m, rank) if schedule == "zbv" else _looped(schedule, p, v, m, rank)))


def _looped(schedule: str, p: int, v: int, m: int, rank: int) -> Iterator[Moment]:
    """See [Note: turns]. Not every pass has to be looked at. With rounds of p microbatches, two periods of all turns show
    everything; where passes are split, the last period with forward passes does, and all that follows it, for input halves
    add up. With one round of m, the first two passes of each turn show everything: later ones hold less."""
    behind, one_round = p - 1 - rank, schedule in (*ALL_FORWARD_FIRST, "1f1b")
    size = m if one_round else m // max(1, m // p)
    split = schedule == "interleaved_zero_bubble"
    warmup = {"1f1b": behind, "interleaved_1f1b": (v - 1) * size + 2 * behind}.get(schedule, (v - 1) * size + behind)
    warmup = v * m if schedule in ALL_FORWARD_FIRST else warmup

    def passes(number: int, turn: int) -> int:
        """How many of the first `number` passes are of the stage whose turn it is `turn`-th."""
        rounds, rest = divmod(number, v * size)
        return rounds * size + min(max(rest - turn * size, 0), size)

    first = max(v * m - warmup - v * size, 0) if split else 0
    for done in range(first, v * m if split else min(v * m, 2 * v * size)):
        if one_round and done % m > 1:
            continue
        forward = [passes(min(warmup + done + 1, v * m), turn) for turn in range(v)]
        backward = [passes(done, v - 1 - turn) for turn in range(v)]
        weights = [passes(max(done - rank, 0), v - 1 - turn) for turn in range(v)] if split else backward
        yield Moment(
            turn=v - 1 - done // size % v,
            held=tuple(one - other for one, other in zip(forward, weights)),
            waiting=tuple(one - other for one, other in zip(backward, weights)),
            halved=tuple(backward) if split else (0,) * v,
            reduced=tuple(number > 0 for number in backward),
        )


def _v_shaped(p: int, m: int, rank: int) -> Iterator[Moment]:
    """ZB-V (Qi et al. 2024): the two turns of the steady phase, and those of the cooldown, where weight halves wait for each
    other. The numbers are exact from 2 p microbatches on; with fewer the schedule has other holes, and they are a little too
    large."""
    late = min(rank, max(m - p + 1, 0))
    for turn, held, waiting, before_the_end in (
        (1, (2 * p - 1 - rank, rank + 1), (0, 0), (2 * p - 1 - rank, p)),
        (0, (2 * p - rank, rank), (0, 0), (2 * p - rank, p)),
        (0, (p, rank), (late, late), (p - rank, 0)),
        (1, (p, rank), (late, late - 1), (p - rank, 1)),
    ):
        if held[turn]:
            halved = tuple(max(m - number, 0) for number in before_the_end)
            yield Moment(turn, tuple(min(number, m) for number in held), waiting, halved, (True, True))


def _most(found: Iterable[Moment]) -> list[Moment]:
    """The moments that no other moment of the same turn exceeds in everything."""
    most: list[Moment] = []
    for moment in found:
        if not any(_covers(other, moment) for other in most):
            most = [other for other in most if not _covers(moment, other)] + [moment]
    return most


def _covers(one: Moment, other: Moment) -> bool:
    mine, its = (moment.held + moment.waiting + moment.halved + moment.reduced for moment in (one, other))
    return one.turn == other.turn and all(more >= less for more, less in zip(mine, its))
