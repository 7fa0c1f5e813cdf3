"""Causal self-attention (Vaswani et al. 2017 §3.2), with grouped queries (Ainslie et al. 2023).

Shapes: B microbatch, T sequence, S keys (T, or more with a cache), D hidden, N query heads, K key/value heads,
G = N / K, H head dim.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from neox_native.config.schema import Model
from neox_native.model.costs import Costs, Kept, Product
from neox_native.model.kinds.kind import Kind
from neox_native.model.layers import OutputLinear, input_cards, output_cards
from neox_native.model.parameters import Cards, RowGroups
from neox_native.model.positions import Context, rotate


class Attention(nn.Module):
    """The fused projection's rows are ordered [K, (G queries, key, value), H], so that any contiguous share of its rows is a
    set of whole heads; with G = 1 that is GPT-NeoX's order."""

    def __init__(self, model: Model):
        super().__init__()
        self.head_dim, self.group_size = model.head_dim, model.num_heads // model.kv_heads
        rows = model.kv_heads * (self.group_size + 2) * self.head_dim
        self.query_key_value = nn.Linear(model.hidden_size, rows, bias=model.attention_bias)
        self.attend = Attend(model)
        self.dense = OutputLinear(model.hidden_size, model.hidden_size, bias=model.attention_bias)

    @property
    def output_bias(self) -> nn.Parameter | None:
        """Left to the block."""
        return self.dense.bias

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
        attended_BNTH = self.attend(q_BTNH.transpose(1, 2), k_BKSH, v_BKSH, context.mask)
        return self.dense(attended_BNTH.transpose(1, 2).flatten(2))


class Attend(nn.Module):
    """The weighted mean of values that each query sees; a seam, see [Note: seams]."""

    def __init__(self, model: Model):
        super().__init__()
        self.dropout = nn.Dropout(model.attention_dropout)

    def forward(self, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
        """[B, N, T, H], [B, K, S, H] and [B, K, S, H] -> [B, N, T, H]; for `mask` see `Context`."""
        grouped = q_BNTH.shape[1] > k_BKSH.shape[1]
        if isinstance(mask, BlockMask):
            attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
            return attend(q_BNTH, k_BKSH, v_BKSH, block_mask=mask, enable_gqa=grouped)
        return F.scaled_dot_product_attention(
            q_BNTH,
            k_BKSH,
            v_BKSH,
            attn_mask=mask,
            dropout_p=self.dropout.p if self.training else 0.0,
            is_causal=mask is None and q_BNTH.shape[2] > 1,
            enable_gqa=grouped,
        )


@cache
def _compiled_flex_attention() -> Any:
    """FlexAttention is fused by compilation only; where blocks are compiled, they take it in."""
    return torch.compile(flex_attention)


def cards(model: Model) -> Cards:
    """The fused projection is cut between key-value heads, the output projection between the channels of heads."""
    group_size = model.num_heads // model.kv_heads
    groups = RowGroups(model.kv_heads, own=group_size * model.head_dim, copied=2 * model.head_dim)
    rows = model.kv_heads * (groups.own + groups.copied)
    return input_cards("query_key_value", model, rows, model.attention_bias, groups) | output_cards(
        "dense", model, model.hidden_size, model.attention_bias
    )


def costs(model: Model) -> Costs:
    """Two products of queries with keys and of weights with values: every pair of positions as MFU counts, T / 2 keys on
    average as run. Flash attention keeps one fp32 number for each head and position instead of the scores."""
    hidden, rows = model.hidden_size, cards(model)["query_key_value.weight"].shape[0]
    turned = hidden + model.kv_heads * model.head_dim if model.pos_emb == "rotary" else 0
    return Costs(
        products=(Product(hidden, rows, cut="columns"), Product(hidden, hidden, cut="inner")),
        kept=(
            Kept("queries, keys and values", rows, dear=True),
            Kept("queries and keys, turned", turned),
            Kept("attended", hidden, dear=model.attention_dropout == 0),
            Kept("logarithms of the sums of exponentials", model.num_heads, fp32=True, dear=model.attention_dropout == 0),
            Kept("mask", model.seq_length, cut=False, only_with_documents=True),
        ),
        flops=2 * hidden * model.seq_length,
        model_flops=12 * hidden * model.seq_length,
        touched=4 * hidden,
        touched_eager=14 * hidden,
        returning=2 * rows,  # queries, keys and values each come back as wide as all three
    )


def dealt(model: Model, holders: int) -> Model:
    """With fewer key-value heads than holders, neighbours share one, and it counts once for each of them."""
    return replace(model, num_kv_heads=holders) if holders > model.kv_heads else model


ATTENTION = Kind(
    "attention", Attention, cards, module="attention", norm="input_layernorm", costs=costs, dealt=dealt, enclosed=True
)
