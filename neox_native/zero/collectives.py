"""The collectives of ZeRO, on flat 1-D buffers: torch renamed two of them between 2.11 and 2.13.

They start at once and return their handle. NCCL runs them on a stream of its own, beside the compute stream, and
`Work.wait()` makes the compute stream wait, not the host; gloo runs them in a thread, and `wait()` blocks.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(matrix: Tensor, row: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Fill `matrix` [W * S] with the row [S] of every rank; `row` may be this rank's part of `matrix`."""
    return _ALL_GATHER(matrix, row, group=group, async_op=True)


def reduce_scatter(row: Tensor, matrix: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Sum the matrices [W * S] of all ranks and leave my row in `row` [S], which may be its part of `matrix`."""
    return _REDUCE_SCATTER(row, matrix, op=dist.ReduceOp.SUM, group=group, async_op=True)


def all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Sum `tensor` over the ranks, in place."""
    work = dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group, async_op=True)
    assert work is not None
    return work
