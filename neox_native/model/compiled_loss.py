"""What the loss computes between its products and its collectives, in compiled kernels: the softmax is never written down.

Shapes: n tokens of a slice, V columns of the vocabulary that are here.

[Note: compiled loss] Eager kernels move 36 bytes for a logit, from copy to rounded gradient. These read the head's product
three times and write its gradient over it once: 8 bytes in low precision.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def largest(logits_nV: Tensor) -> Tensor:
    """fp32 [n]: the largest logit of each token."""
    return logits_nV.amax(dim=-1).float()


def sums(logits_nV: Tensor, largest_n: Tensor, columns_n: Tensor) -> Tensor:
    """fp32 [2, n], less each token's largest logit: the sum of exponentials, and the target's logit, 0 where its column, negative or
    V and more there, is not here."""
    below_nV = logits_nV.float() - largest_n[:, None]
    target_n = torch.where(_is_target(logits_nV, columns_n), below_nV, 0.0).sum(dim=-1)
    return torch.stack([below_nV.exp().sum(dim=-1), target_n])


def overwrite_with_gradient(logits_nV: Tensor, largest_n: Tensor, total_n: Tensor, columns_n: Tensor, factor_n: Tensor) -> None:
    """(softmax - one-hot) * factor, in the logits' memory and type."""
    softmax_nV = (logits_nV.float() - largest_n[:, None]).exp() / total_n[:, None]
    logits_nV.copy_((softmax_nV - _is_target(logits_nV, columns_n).float()) * factor_n[:, None])


def _is_target(logits_nV: Tensor, columns_n: Tensor) -> Tensor:
    return torch.arange(logits_nV.shape[-1], device=logits_nV.device) == columns_n[:, None]


@cache
def compiled(function: Any) -> Any:
    """One of these functions, compiled once for each length of a slice."""
    return torch.compile(function, fullgraph=True, dynamic=False)
