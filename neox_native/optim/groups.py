"""The optimizer that the config names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from neox_native.config.schema import Optimizer
from neox_native.optim import elementwise as elementwise_rules

ParameterGroups = list[dict[str, Any]]


def optimizer_factory(optimizer: Optimizer, elementwise: bool = False) -> Callable[[ParameterGroups], torch.optim.Optimizer]:
    """A function from parameter groups to the optimizer of the [optimizer] section.

    Groups that do not decay bring `weight_decay` 0. Kernels are fused: one pass over the state, which also clips,
    unscales and skips. AdamW's decay is decoupled (Loshchilov & Hutter 2019); SGD's is added to the gradient.

    Args:
        elementwise: update an element to the same bits in shards of any length.
    """
    library: Any = elementwise_rules if elementwise else torch.optim
    common: dict[str, Any] = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay, "fused": True}

    def make(groups: ParameterGroups) -> torch.optim.Optimizer:
        if optimizer.name == "sgd":
            return library.SGD(groups, momentum=optimizer.momentum, **common)
        beta1, beta2 = optimizer.betas
        return library.AdamW(groups, betas=(beta1, beta2), eps=optimizer.eps, **common)

    return make
