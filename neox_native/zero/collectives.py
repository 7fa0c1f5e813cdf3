"""The collectives of ZeRO, on flat 1-D buffers: torch renamed two of them between 2.11 and 2.13.

They start at once and return a handle. NCCL runs them on a stream of its own, beside the compute stream, and `wait`
makes the compute stream wait, not the host; gloo runs them in a thread, and `wait` blocks.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Let what follows on the compute stream see the result."""


class _SumOfRows:
    """The second half of a reduce-scatter whose rows have been exchanged."""

    def __init__(self, row: Tensor, rows_WS: Tensor, exchange: dist.Work):
        self.row, self.rows_WS, self.exchange = row, rows_WS, exchange

    def wait(self) -> None:
        self.exchange.wait()
        torch.sum(self.rows_WS, dim=0, out=self.row)


def all_gather(matrix: Tensor, row: Tensor, group: dist.ProcessGroup) -> Handle:
    """Fill `matrix` [W * S] with the row [S] of every rank; `row` may be this rank's part of `matrix`."""
    return _ALL_GATHER(matrix, row, group=group, async_op=True)


def reduce_scatter(row: Tensor, matrix: Tensor, group: dist.ProcessGroup) -> Handle:
    """Sum the matrices [W * S] of all ranks and leave my row in `row` [S], which may be its part of `matrix`.

    gloo's own is an all-reduce of a copy and a slice. Exchanging rows and adding them up moves half as many bytes.
    """
    if dist.get_backend(group) != "gloo":
        return _REDUCE_SCATTER(row, matrix, op=dist.ReduceOp.SUM, group=group, async_op=True)
    rows = torch.empty_like(matrix)
    exchange = dist.all_to_all_single(rows, matrix, group=group, async_op=True)
    assert exchange is not None
    return _SumOfRows(row, rows.view(-1, row.numel()), exchange)


def all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Handle:
    """Sum `tensor` over the ranks, in place."""
    work = dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group, async_op=True)
    assert work is not None
    return work
