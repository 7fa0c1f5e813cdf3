"""Stragglers: which rank of each pipeline stage computes longest, while its peers wait for it."""

from __future__ import annotations

import socket
import statistics

from neox_native.launch import Ranks


class Stragglers:
    """Compares how long the ranks computed, since the last comparison.

    Args:
        stage: this rank's place in the pipeline; only ranks of one stage have the same work.
    """

    def __init__(self, ranks: Ranks, stage: int) -> None:
        self.ranks, self.stage = ranks, stage
        self._seconds, self._steps = 0.0, 0

    def computed(self, seconds: float) -> None:
        """This rank has computed for so long."""
        self._seconds += seconds

    def step_done(self) -> None:
        """Count one more step."""
        self._steps += 1

    def compare(self) -> str:
        """Name the slowest rank of each stage, in one line. A collective."""
        mine = self.stage, socket.gethostname(), self._seconds / self._steps
        self._seconds, self._steps = 0.0, 0
        return "; ".join(slowest_ranks(self.ranks.gather(mine)))


def slowest_ranks(places: list[tuple[int, str, float]]) -> list[str]:
    """Name the slowest rank of each pipeline stage.

    Args:
        places: (stage, host, seconds of own work per step) of every rank, by rank.
    """
    lines = []
    for stage in sorted({stage for stage, _, _ in places}):
        seconds = {rank: place[2] for rank, place in enumerate(places) if place[0] == stage}
        slowest = max(seconds, key=lambda rank: seconds[rank])
        lines.append(
            f"stage {stage}: slowest is rank {slowest} ({places[slowest][1]}) with {seconds[slowest]:.3f} s a step, "
            f"median {statistics.median(seconds.values()):.3f} s"
        )
    return lines
