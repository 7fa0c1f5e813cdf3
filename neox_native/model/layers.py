"""What the layer kinds share: norms, the output projection, the join; and the cards of projections and norms.

Shapes: B microbatch, T sequence, D hidden.

[Note: seams] Modules without parameters (`Normalize`, `Join`, `Join.total`) stand where a tensor-parallel plan changes
how an activation is laid out. The model gives them names and knows nothing of what a plan does there.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from neox_native.config.schema import Model
from neox_native.model.initialize import standard_deviation
from neox_native.model.parameters import Card, Cards, RowGroups, normal, vector


class Normalize(nn.Module):
    """x̂ = x with its last dim normalised, in fp32 inside; no parameters, so that several norms of the same x
    (GPT-NeoX's parallel residual) share one x̂."""

    def __init__(self, model: Model):
        super().__init__()
        self.hidden_size, self.eps = model.hidden_size, model.norm_eps
        self.subtract_mean = model.norm == "layernorm"

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D], same dtype."""
        if self.subtract_mean:
            return F.layer_norm(x_BTD, (self.hidden_size,), eps=self.eps)
        return F.rms_norm(x_BTD.float(), (self.hidden_size,), eps=self.eps).to(x_BTD.dtype)


class Affine(nn.Module):
    """The learned half of a norm: weight * x̂ + bias (RMSNorm has no bias)."""

    def __init__(self, model: Model):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(model.hidden_size))
        self.bias = nn.Parameter(torch.zeros(model.hidden_size)) if model.norm == "layernorm" else None

    def forward(self, normalised_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.bias is None:
            return normalised_BTD * self.weight
        return torch.addcmul(self.bias, normalised_BTD, self.weight)


class OutputLinear(nn.Linear):
    """A branch's last projection. Its bias is left to `Join`, which adds it once to the sum of the branches."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, in] -> [B, T, out], bias not yet added."""
        return F.linear(x, self.weight)


class Vector(nn.Module):
    """A parameter that a kind's arithmetic reads as a plain tensor, by calling this module: a seam, at which a holder that
    has a share of the channels gets its share of the parameter."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self) -> Tensor:
        """The parameter."""
        return self.weight


class Join(nn.Module):
    """Sum of the branches' outputs, then their biases: each bias is added exactly once, however the sum was split."""

    def __init__(self) -> None:
        super().__init__()
        self.total = nn.Identity()

    def forward(self, branches: list[Tensor], biases: list[Tensor | None]) -> Tensor:
        """Tensors [B, T, D] and biases [D] or None -> [B, T, D]."""
        first, *rest = branches
        joined = self.total(sum(rest, first))
        for bias in biases:
            if bias is not None:
                joined = joined + bias
        return joined


def norm_cards(model: Model) -> Cards:
    """Cards of `Affine`. Each holder reads its output for some heads or channels only, so its gradient is a share of a sum."""
    weight = {"weight": vector(model.hidden_size, 1.0, gradient="partial")}
    return weight | ({"bias": vector(model.hidden_size, 0.0, gradient="partial")} if model.norm == "layernorm" else {})


def input_cards(name: str, model: Model, rows: int, bias: bool, groups: RowGroups | None = None) -> Cards:
    """A branch's first projection, D -> rows, cut between its rows (column-parallel; Shoeybi et al. 2019 §3)."""
    deviation = standard_deviation(model.init, model)
    cards = {f"{name}.weight": Card((rows, model.hidden_size), normal(deviation), cut=0, groups=groups)}
    return cards | ({f"{name}.bias": vector(rows, 0.0, cut=0, groups=groups)} if bias else {})


def output_cards(name: str, model: Model, columns: int, bias: bool) -> Cards:
    """`OutputLinear`, columns -> D, cut between its columns (row-parallel). Its bias is added after the sum over holders."""
    deviation = standard_deviation(model.output_init, model)
    cards = {f"{name}.weight": Card((model.hidden_size, columns), normal(deviation), cut=1)}
    return cards | ({f"{name}.bias": vector(model.hidden_size, 0.0, gradient="partial_in_sequence")} if bias else {})
