"""Exchanging rows gives what torch's collectives give."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from neox_native.zero import collectives
from tests.ranks import run_ranks

SIZE = 5


def both(in_place: bool, dtype: torch.dtype) -> None:
    """Compare on the group of all ranks and on the group of all but the first."""
    everyone, rank = list(range(dist.get_world_size())), dist.get_rank()
    for ranks, group in ((everyone, dist.group.WORLD), (everyone[1:], dist.new_group(everyone[1:]))):
        if rank not in ranks:
            continue
        world, place = len(ranks), ranks.index(rank)
        matrix = torch.arange(world * SIZE).add(100 * rank).to(dtype)
        total, gathered = matrix.clone(), torch.empty_like(matrix)
        mine = matrix.view(world, SIZE)[place]

        dist.all_reduce(total, group=group)
        row = mine if in_place else torch.empty_like(mine)
        collectives.reduce_scatter(row, matrix, group).wait()
        assert torch.equal(row, total.view(world, SIZE)[place])

        buffer = gathered.view(world, SIZE)[place] if in_place else torch.empty(SIZE, dtype=dtype)
        buffer.copy_(row)
        collectives.all_gather(gathered, buffer, group).wait()
        others = [other for other in range(world) if other != place]
        assert torch.equal(buffer, total.view(world, SIZE)[place])
        assert torch.equal(gathered.view(world, SIZE)[others], total.view(world, SIZE)[others])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("world_size", [3, 4])
def test_rows_are_exchanged_as_collectives_would(world_size: int, in_place: bool) -> None:
    run_ranks(world_size, both, in_place, torch.float32)


def many(count: int) -> bool:
    """Several under way at once, waited for out of order."""
    matrices = [torch.full((2 * SIZE,), float(number)) for number in range(count)]
    rows = [torch.empty(SIZE) for _ in matrices]
    handles = [collectives.reduce_scatter(*pair, dist.group.WORLD) for pair in zip(rows, matrices)]
    for handle in reversed(handles):
        handle.wait()
    return all((row == 2 * number).all() for number, row in enumerate(rows))


def test_collectives_under_way_do_not_mix() -> None:
    assert all(run_ranks(2, many, 5))
