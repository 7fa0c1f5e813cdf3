"""The feed-forward layer: two projections around an activation; the gated variants multiply by a gate (Shazeer 2020).

Shapes: B microbatch, T sequence, D hidden, F feed-forward.
"""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from neox_native.config.schema import Model
from neox_native.model.costs import Costs, Kept, Product
from neox_native.model.kinds.kind import Kind
from neox_native.model.layers import OutputLinear, input_cards, output_cards
from neox_native.model.parameters import Cards
from neox_native.model.positions import Context

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "geglu": F.gelu,
    "swiglu": F.silu,
    "reglu": F.relu,
}


class FeedForward(nn.Module):
    """GPT-NeoX's names: h is the hidden size, 4h the feed-forward width, whatever it is."""

    def __init__(self, model: Model):
        super().__init__()
        self.activation = ACTIVATIONS[model.activation]
        self.dense_h_to_4h = nn.Linear(model.hidden_size, model.ffn_size, bias=model.mlp_bias)
        self.gate_h_to_4h = nn.Linear(model.hidden_size, model.ffn_size, bias=model.mlp_bias) if model.gated else None
        self.dense_4h_to_h = OutputLinear(model.ffn_size, model.hidden_size, bias=model.mlp_bias)

    @property
    def output_bias(self) -> nn.Parameter | None:
        """Left to the block."""
        return self.dense_4h_to_h.bias

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """[B, T, D] -> [B, T, D], output bias not yet added."""
        up_BTF = self.dense_h_to_4h(x_BTD)
        if self.gate_h_to_4h is None:
            return self.dense_4h_to_h(self.activation(up_BTF))
        return self.dense_4h_to_h(self.activation(self.gate_h_to_4h(x_BTD)) * up_BTF)


def cards(model: Model) -> Cards:
    """Every projection is cut between the channels of the feed-forward width."""
    found = input_cards("dense_h_to_4h", model, model.ffn_size, model.mlp_bias)
    if model.gated:
        found |= input_cards("gate_h_to_4h", model, model.ffn_size, model.mlp_bias)
    return found | output_cards("dense_4h_to_h", model, model.ffn_size, model.mlp_bias)


def costs(model: Model) -> Costs:
    """It keeps what each projection of x̂ gives, its activation and, with a gate, the product of the two."""
    hidden, ffn, inputs = model.hidden_size, model.ffn_size, 2 if model.gated else 1
    names = ("up", "gate", "activated", "gated") if model.gated else ("up", "activated")
    return Costs(
        products=(Product(hidden, ffn, cut="columns"),) * inputs + (Product(ffn, hidden, cut="inner"),),
        kept=tuple(Kept(name, ffn, dear=name in ("up", "gate")) for name in names),
        touched=(inputs + 1) * ffn,
        touched_eager=(inputs + 1) * ffn,
    )


FEED_FORWARD = Kind(
    "feed_forward", FeedForward, cards, module="mlp", norm="post_attention_layernorm", costs=costs, enclosed=True
)
