"""The collectives of ZeRO, on flat 1-D buffers. They start at once and return a handle.

NCCL runs them on a stream of its own, beside the compute stream, and `wait` makes the compute stream wait, not the
host. torch renamed two of them between 2.11 and 2.13.

gloo's own all-gather goes through a copy of the matrix, and its reduce-scatter is an all-reduce of a copy and a slice.
There, rows of gradients and chunks of parameters are exchanged directly between the memory of each pair of ranks: the volume
of the textbook, and 0.2 to 0.5 of the CPU time, measured on 2 ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


Waiting = Callable[[], AbstractContextManager[None]]
"""Makes a block around the wait for a collective, for whoever times it."""


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Let what follows on the compute stream see the result."""


def pairwise(group: dist.ProcessGroup) -> bool:
    """Whether ranks exchange rows, and chunks of rows, pair by pair."""
    return dist.get_backend(group) == "gloo"


def exchange_chunks(matrices: Sequence[Tensor], group: dist.ProcessGroup) -> Handle:
    """Fill each of the matrices [W, *] with the rows that the other ranks have in theirs; mine is there."""
    mine = [matrix[dist.get_rank(group)] for matrix in matrices]
    return _Exchange([mine] * dist.get_world_size(group), list(zip(*matrices)), group)


def all_gather(matrix: Tensor, row: Tensor, group: dist.ProcessGroup) -> Handle:
    """Fill `matrix` [W * S] with the row [S] of every rank; `row` may be this rank's part of `matrix`."""
    return _ALL_GATHER(matrix, row, group=group, async_op=True)


def reduce_scatter(row: Tensor, matrix: Tensor, group: dist.ProcessGroup) -> Handle:
    """Sum the matrices [W * S] of all ranks and leave my row in `row` [S], which may be its part of `matrix`."""
    if not pairwise(group):
        return _REDUCE_SCATTER(row, matrix, op=dist.ReduceOp.SUM, group=group, async_op=True)
    return _ExchangeAndSum(row, matrix.view(dist.get_world_size(group), -1), group)


def all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Handle:
    """Sum `tensor` over the ranks, in place."""
    work = dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group, async_op=True)
    assert work is not None
    return work


class _Exchange:
    """Send the tensors `outgoing[r]` to rank r and receive the tensors `incoming[r]` from it, for all others r."""

    def __init__(self, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Tensor]], group: dist.ProcessGroup):
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        others = [(rank + distance) % world for distance in range(1, world)]
        self.buffers = outgoing, incoming  # alive until `wait`
        self.works = [dist.irecv(each, group=group, group_src=other) for other in others for each in incoming[other]]
        self.works += [dist.isend(each, group=group, group_dst=other) for other in others for each in outgoing[other]]

    def wait(self) -> None:
        for work in self.works:
            assert work is not None
            work.wait()


class _ExchangeAndSum(_Exchange):
    """A reduce-scatter: everybody's version of my row comes here and is added up."""

    def __init__(self, row: Tensor, rows_WS: Tensor, group: dist.ProcessGroup):
        rank = dist.get_rank(group)
        self.row, self.mine = row, rows_WS[rank]
        first, *rest = (other for other in range(len(rows_WS)) if other != rank)
        # A row apart from the matrix is free until the sum goes there.
        self.received = {first: torch.empty_like(row) if row.data_ptr() == self.mine.data_ptr() else row}
        self.received |= {other: torch.empty_like(row) for other in rest}
        incoming = [[self.received[other]] if other in self.received else [] for other in range(len(rows_WS))]
        super().__init__([[each] for each in rows_WS], incoming, group)

    def wait(self) -> None:
        super().wait()
        first, *rest = self.received.values()
        for version in rest:
            first.add_(version)
        torch.add(self.mine, first, out=self.row)  # last, for the row may be mine, or hold the first version
