"""Cross-entropy over a vocabulary that may be cut over the tp axis. The logits are never gathered.

Shapes: B microbatch, T sequence, V this rank's share of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from neox_native.model.readout import IGNORED

class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Per-token negative log-likelihood from three all-reduces of [B, T] forward and none backward
    (Shoeybi et al. 2019 §3). Backward is softmax minus one-hot, this rank's columns."""

    @staticmethod
    def forward(ctx, logits_BTV: Tensor, targets_BT: Tensor, group: dist.ProcessGroup) -> Tensor:
        vocab_start = dist.get_rank(group) * logits_BTV.shape[-1]
        logits_BTV = logits_BTV.float()
        maximum_BT = logits_BTV.amax(dim=-1)
        dist.all_reduce(maximum_BT, op=dist.ReduceOp.MAX, group=group)
        exponentials_BTV = (logits_BTV - maximum_BT[..., None]).exp()
        total_BT = exponentials_BTV.sum(dim=-1)
        dist.all_reduce(total_BT, group=group)

        local_BT = targets_BT - vocab_start
        elsewhere_BT = (local_BT < 0) | (local_BT >= logits_BTV.shape[-1])
        local_BT = local_BT.masked_fill(elsewhere_BT, 0)
        target_logit_BT = logits_BTV.gather(-1, local_BT[..., None]).squeeze(-1) - maximum_BT
        target_logit_BT = target_logit_BT.masked_fill(elsewhere_BT, 0.0)
        dist.all_reduce(target_logit_BT, group=group)

        probabilities_BTV = exponentials_BTV.div_(total_BT[..., None])
        ctx.save_for_backward(probabilities_BTV, local_BT, elsewhere_BT)
        return total_BT.log() - target_logit_BT

    @staticmethod
    def backward(ctx, gradient_BT: Tensor) -> tuple[Tensor, None, None]:
        probabilities_BTV, local_BT, elsewhere_BT = ctx.saved_tensors
        minus_one_hot = -(~elsewhere_BT).to(probabilities_BTV.dtype)
        # In place: the logits are the largest activation there is, and this node runs once.
        gradient_BTV = probabilities_BTV.scatter_add_(-1, local_BT[..., None], minus_one_hot[..., None])
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
