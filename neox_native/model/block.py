"""One layer: residual steps of the kinds that `model.pattern` names for it.

Shapes: B microbatch, T sequence, D hidden.
"""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from neox_native.config.schema import Model
from neox_native.model.kinds import Kind, residual_steps
from neox_native.model.layers import Affine, Join, Normalize, norm_cards
from neox_native.model.masks import seed_masks
from neox_native.model.parameters import Cards, under
from neox_native.model.positions import Context


class Block(nn.Module):
    """A layer of one or more kinds.

    A residual step normalises x once: the untied norms of its kinds differ only in their affine halves. Hidden dropout falls
    on the joined sum of a step's branches.
    """

    def __init__(self, model: Model, kinds: tuple[Kind, ...]):
        super().__init__()
        self.steps = [[(kind.norm, kind.module) for kind in step] for step in residual_steps(kinds, model)]
        self.normalize = Normalize(model)
        for kind in kinds:
            self.add_module(kind.norm, Affine(model))
        for kind in kinds:
            self.add_module(kind.module, kind.build(model))
        self.join = Join()
        self.dropout = nn.Dropout(model.hidden_dropout)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        seed_masks(x_BTD.device, context.seed)
        return self.compute(x_BTD, context._replace(seed=None))

    def compute(self, x_BTD: Tensor, context: Context) -> Tensor:
        """`forward` without the seed: what may be compiled, once for all seeds."""
        for step in self.steps:
            reads = self.read(self.normalize(x_BTD), step)
            branches = [getattr(self, module)(read, context) for (_, module), read in zip(step, reads)]
            biases = [getattr(self, module).output_bias for _, module in step]
            x_BTD = x_BTD + self.dropout(self.join(branches, biases))
        return x_BTD

    def read(self, normalised_BTD: Tensor, step: list[tuple[str, str]]) -> list[Tensor]:
        """x̂ [B, T, D] -> what each branch of a residual step reads: x̂ through the learned half of its own norm."""
        return [getattr(self, norm)(normalised_BTD) for norm, _ in step]


def block_cards(model: Model, kinds: tuple[Kind, ...]) -> Cards:
    """Each parameter's card, by its name in the block, in the order in which the block holds them."""
    found: Cards = {}
    for kind in kinds:
        found |= under(kind.norm, norm_cards(model))
    for kind in kinds:
        found |= under(kind.module, kind.cards(model))
    return found
