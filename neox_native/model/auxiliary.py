"""Losses that a layer adds to the step's.

[Note: auxiliary losses] A layer hands its loss to an `AuxiliaryLoss`, together with an activation that the rest of the model
reads. The activation passes unchanged; in the backward pass, when its gradient arrives, the loss receives the gradient that
the sum over the step gives it (as Megatron-LM does for the balance of experts). So the loss reaches no other stage of a
pipeline, and works with recomputation and in compiled blocks. It is a sum over tokens: the step divides it by its weight,
like the sum over targets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor


class Auxiliary(NamedTuple):
    """What a training step tells of itself for one microbatch."""

    loss_weight: Tensor
    """What a loss is multiplied by in the step's, [1]."""
    microbatch: Tensor
    """The microbatch's number in the step, int64 [1]."""


class AuxiliaryLoss(nn.Module):
    """A seam: where holders share the work of a layer, the loss of each is its share of a sum. See [Note: auxiliary losses].

    Args:
        name: the metric that logs its mean over the step; layers that give the same name are summed.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.sums = torch.empty(0)
        """One for each microbatch of the step, at its number, so that a recomputed forward pass counts once."""

    def forward(self, x: Tensor, loss: Tensor, step: Auxiliary | None) -> Tensor:
        """Returns `x`. In a training step its backward pass also gives the scalar `loss` its gradient."""
        if step is None:
            return x
        self.sums.index_copy_(0, step.microbatch, loss.detach().float().reshape(1))
        return _Join.apply(x, loss, step.loss_weight)


class _Join(torch.autograd.Function):
    """The identity on an activation, and the end of the path from a loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight.to(loss.dtype).reshape(loss.shape))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, ctx.saved_tensors[0], None
