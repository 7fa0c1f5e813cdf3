"""Stragglers: the rank of each pipeline stage that computes longest, while its peers wait for it."""

from __future__ import annotations

import statistics


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
