"""The parts of a NeoX block.

Shapes: B microbatch, T sequence, S keys (T, or more with a cache), D hidden, F feed-forward, N query heads,
K key/value heads, G = N / K, H head dim.

[Note: seams] Modules without parameters (`Normalize`, `Join`, `Join.total`) stand where a tensor-parallel plan changes
how an activation is laid out. The model gives them names and knows nothing of what a plan does there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from neox_native.config.schema import Model
from neox_native.model.positions import Context, rotate

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "geglu": F.gelu,
    "swiglu": F.silu,
    "reglu": F.relu,
}


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


class Join(nn.Module):
    """Sum of the branches' outputs, then their biases: each bias is added exactly once, however the sum was split."""

    def __init__(self) -> None:
        super().__init__()
        self.total = nn.Identity()

    def forward(self, branches: list[Tensor], biases: list[Tensor | None]) -> Tensor:
        """Tensors [B, T, D] and biases [D] or None -> [B, T, D]."""
        joined = self.total(branches[0] if len(branches) == 1 else branches[0] + branches[1])
        for bias in biases:
            if bias is not None:
                joined = joined + bias
        return joined


class Attention(nn.Module):
    """Causal self-attention. The fused projection's rows are ordered [K, (G queries, key, value), H], so that any
    contiguous share of its rows is a set of whole heads; with G = 1 that is GPT-NeoX's order."""

    def __init__(self, model: Model):
        super().__init__()
        self.head_dim, self.group_size = model.head_dim, model.num_heads // model.kv_heads
        self.dropout = model.attention_dropout
        rows = model.kv_heads * (self.group_size + 2) * self.head_dim
        self.query_key_value = nn.Linear(model.hidden_size, rows, bias=model.attention_bias)
        self.dense = OutputLinear(model.hidden_size, model.hidden_size, bias=model.attention_bias)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """[B, T, D] -> [B, T, D], output bias not yet added."""
        # -1 heads: the projection may hold any share of them.
        qkv = self.query_key_value(x_BTD).unflatten(-1, (-1, self.group_size + 2, self.head_dim))
        q_BTNH, k_BTKH, v_BTKH = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        if context.cos_TR is not None:
            q_BTNH = rotate(q_BTNH, context.cos_TR, context.sin_TR)
            k_BTKH = rotate(k_BTKH, context.cos_TR, context.sin_TR)
        if context.remember is not None:
            k_BKSH, v_BKSH = context.remember(k_BTKH, v_BTKH)
        else:
            k_BKSH, v_BKSH = k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)
        attended_BNTH = self._attend(q_BTNH.transpose(1, 2), k_BKSH, v_BKSH, context.mask)
        return self.dense(attended_BNTH.transpose(1, 2).flatten(2))

    def _attend(self, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
        grouped = self.group_size > 1
        if isinstance(mask, BlockMask):
            attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
            return attend(q_BNTH, k_BKSH, v_BKSH, block_mask=mask, enable_gqa=grouped)
        return F.scaled_dot_product_attention(
            q_BNTH,
            k_BKSH,
            v_BKSH,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and q_BNTH.shape[2] > 1,
            enable_gqa=grouped,
        )


@cache
def _compiled_flex_attention() -> Any:
    """FlexAttention is fused by compilation only; where blocks are compiled, they take it in."""
    return torch.compile(flex_attention)


class FeedForward(nn.Module):
    """Two projections around an activation; the gated variants multiply by a gate (Shazeer 2020)."""

    def __init__(self, model: Model):
        super().__init__()
        self.activation = ACTIVATIONS[model.activation]
        self.dense_h_to_4h = nn.Linear(model.hidden_size, model.ffn_size, bias=model.mlp_bias)
        self.gate_h_to_4h = nn.Linear(model.hidden_size, model.ffn_size, bias=model.mlp_bias) if model.gated else None
        self.dense_4h_to_h = OutputLinear(model.ffn_size, model.hidden_size, bias=model.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D], output bias not yet added."""
        up_BTF = self.dense_h_to_4h(x_BTD)
        if self.gate_h_to_4h is None:
            return self.dense_4h_to_h(self.activation(up_BTF))
        return self.dense_4h_to_h(self.activation(self.gate_h_to_4h(x_BTD)) * up_BTF)


class Block(nn.Module):
    """One layer, with GPT-NeoX's parallel residual or the sequential one.

    The parallel form normalises x once: its two untied norms differ only in their affine halves. Hidden dropout
    falls on the joined sum of a residual step's branches.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.parallel_residual = model.parallel_residual
        self.normalize = Normalize(model)
        self.input_layernorm = Affine(model)
        self.post_attention_layernorm = Affine(model)
        self.attention = Attention(model)
        self.mlp = FeedForward(model)
        self.join = Join()
        self.dropout = nn.Dropout(model.hidden_dropout)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        attention_bias, mlp_bias = self.attention.dense.bias, self.mlp.dense_4h_to_h.bias
        normalised = self.normalize(x_BTD)
        attended = self.attention(self.input_layernorm(normalised), context)
        if self.parallel_residual:
            fed = self.mlp(self.post_attention_layernorm(normalised))
            return x_BTD + self.dropout(self.join([attended, fed], [attention_bias, mlp_bias]))
        x_BTD = x_BTD + self.dropout(self.join([attended], [attention_bias]))
        fed = self.mlp(self.post_attention_layernorm(self.normalize(x_BTD)))
        return x_BTD + self.dropout(self.join([fed], [mlp_bias]))
