"""Cross-entropy over a vocabulary that may be cut over the tp axis. The logits are never gathered.

Shapes: B microbatch, T sequence, V this rank's share of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from neox_native.model.readout import IGNORED


class Softmax(NamedTuple):
    """What the holders of the logits' columns find out together, in fp32."""

    exponentials_BTV: Tensor
    """e to the power of this rank's logits, each less its token's largest one."""
    total_BT: Tensor
    """Their sum over the whole vocabulary."""
    target_BT: Tensor
    """The target's logit less the largest one: 0 where the target is the most probable token."""
    column_BT: Tensor
    """The target's column on this rank; 0 where it lies elsewhere."""
    elsewhere_BT: Tensor
    """Whether another rank has the target's column."""


def softmax(logits_BTV: Tensor, targets_BT: Tensor, group: dist.ProcessGroup | None) -> Softmax:
    """The parts of a softmax over columns that lie on the ranks of `group` in their order, from three all-reduces of [B, T]."""

    def over_ranks(value: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        if group is not None:
            dist.all_reduce(value, op=operation, group=group)
        return value

    columns, rank = logits_BTV.shape[-1], 0 if group is None else dist.get_rank(group)
    logits_BTV = logits_BTV.float()
    maximum_BT = over_ranks(logits_BTV.amax(dim=-1), dist.ReduceOp.MAX)
    exponentials_BTV = (logits_BTV - maximum_BT[..., None]).exp()
    total_BT = over_ranks(exponentials_BTV.sum(dim=-1))
    column_BT = targets_BT - rank * columns
    elsewhere_BT = (column_BT < 0) | (column_BT >= columns)
    column_BT = column_BT.masked_fill(elsewhere_BT, 0)
    target_BT = logits_BTV.gather(-1, column_BT[..., None]).squeeze(-1) - maximum_BT
    return Softmax(exponentials_BTV, total_BT, over_ranks(target_BT.masked_fill(elsewhere_BT, 0.0)), column_BT, elsewhere_BT)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Per-token negative log-likelihood, without a collective in the backward pass (Shoeybi et al. 2019 §3): its gradient is
    softmax minus one-hot, this rank's columns."""

    @staticmethod
    def forward(ctx, logits_BTV: Tensor, targets_BT: Tensor, group: dist.ProcessGroup) -> Tensor:
        found = softmax(logits_BTV, targets_BT, group)
        probabilities_BTV = found.exponentials_BTV.div_(found.total_BT[..., None])
        ctx.save_for_backward(probabilities_BTV, found.column_BT, found.elsewhere_BT)
        return found.total_BT.log() - found.target_BT

    @staticmethod
    def backward(ctx, gradient_BT: Tensor) -> tuple[Tensor, None, None]:
        probabilities_BTV, column_BT, elsewhere_BT = ctx.saved_tensors
        minus_one_hot = -(~elsewhere_BT).to(probabilities_BTV.dtype)
        # In place: the logits are the largest activation there is, and this node runs once.
        gradient_BTV = probabilities_BTV.scatter_add_(-1, column_BT[..., None], minus_one_hot[..., None])
        return gradient_BTV.mul_(gradient_BT[..., None]), None, None


def vocab_parallel_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What `readout.CrossEntropy` computes, from this rank's columns of the logits.

    Args:
        targets_BT: global token ids.
        group: ranks that hold the other columns, in rank order.
    """
    ignored_BT = targets_BT == IGNORED
    losses_BT = _VocabParallelCrossEntropy.apply(logits_BTV, targets_BT.masked_fill(ignored_BT, 0), group)
    return losses_BT.masked_fill(ignored_BT, 0.0)
