"""The end of the model: from hidden states to a value per token.

Shapes: B microbatch, T sequence, D hidden, V padded vocabulary.
"""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from neox_native.config.schema import Model
from neox_native.model.cross_entropy import CrossEntropy
from neox_native.model.initialize import standard_deviation
from neox_native.model.layers import Affine, Normalize, norm_cards
from neox_native.model.parameters import Card, Cards, normal, under

class Readout(nn.Module):
    """The final norm, the head, and what the head's logits say of the targets.

    Its parameters' global names have no prefix: `final_layer_norm.weight`, `embed_out.weight`.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.normalize = Normalize(model)
        self.final_layer_norm = Affine(model)
        self.embed_out = nn.Linear(model.hidden_size, model.padded_vocab_size, bias=False)
        self.cross_entropy = CrossEntropy()

    def forward(self, x_BTD: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """[B, T, D] -> logits [B, T, V], or with targets their negative log-likelihood, fp32 [B, T]."""
        x_BTD = self.final_layer_norm(self.normalize(x_BTD))
        return self.embed_out(x_BTD) if targets_BT is None else self.cross_entropy(x_BTD, self.embed_out.weight, targets_BT)


def readout_cards(model: Model) -> Cards:
    """Each parameter's card, by its global name; a tied head is the embedding's matrix and has none."""
    found = under("final_layer_norm", norm_cards(model))
    if not model.tie_embeddings:
        shape, init = (model.padded_vocab_size, model.hidden_size), normal(standard_deviation(model.init, model))
        found["embed_out.weight"] = Card(shape, init, cut=0, role="head")
    return found
