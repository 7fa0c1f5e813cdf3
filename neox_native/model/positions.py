"""Position information: rotary, sinusoidal and ALiBi tables, and the attention mask of packed documents.

Shapes: B microbatch, T sequence, S keys, N heads, Q blocks, K key/value heads, H head dim, R rotary dim, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from neox_native.model.auxiliary import Auxiliary

BLOCK = 128
"""Tokens of a block of FlexAttention, Q of which make a row."""
Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Stores a layer's new keys and values [B, T, K, H]; returns those of all positions so far [B, K, S, H]."""


class Context(NamedTuple):
    """What every block of one forward pass needs to know, of positions above all."""

    cos_TR: Tensor | None
    """fp32 cosines [T, 1, R], or [B, T, 1, R] where positions restart inside a row; None without rotary."""
    sin_TR: Tensor | None
    """The sines beside them."""
    mask: Tensor | BlockMask | None
    """None: plain causal attention, or one last query that sees every key. Boolean [B, 1, T, S]: True where a query
    may look; a BlockMask says the same to FlexAttention. Float [B or 1, N, T, S]: added to the attention scores.
    S keys: T, or more with a cache."""
    remember: Remember | None = None
    """Set where a cache holds earlier positions of this layer."""
    step: Auxiliary | None = None
    """Set in training steps of a model with auxiliary losses."""
    seed: int | None = None
    """Of this layer's dropout masks; None: they go on in the random stream. See [Note: masks]."""


def rotary_tables(rotary_dim: int, seq_length: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """fp32 cosines and sines [T, 1, R] for the half-split rotation (Su et al. 2021 §3.4; GPT-NeoX's layout)."""
    channels_R = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32)
    angles_TR = torch.outer(torch.arange(seq_length, device=device).float(), base ** (-channels_R / rotary_dim))
    angles_TR = torch.cat((angles_TR, angles_TR), dim=-1)[:, None, :]
    return angles_TR.cos(), angles_TR.sin()


def rotate(x_BTNH: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Turn the first R channels of each head by its position's angles, in fp32; the rest passes unchanged."""
    seq_length, rotary_dim = x_BTNH.shape[1], cos_TR.shape[-1]
    cos_TR, sin_TR = cos_TR[..., :seq_length, :, :], sin_TR[..., :seq_length, :, :]
    turned, passed = x_BTNH[..., :rotary_dim].float(), x_BTNH[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos_TR + torch.cat((-second, first), dim=-1) * sin_TR
    return torch.cat((turned.to(x_BTNH.dtype), passed), dim=-1)


def sinusoidal_table(seq_length: int, hidden_size: int, device: torch.device) -> Tensor:
    """fp32 [T, D]: sines in the first half of the channels, cosines in the second (Vaswani et al. 2017 §3.5)."""
    frequencies_D = 10000.0 ** (-torch.arange(0, hidden_size, 2, device=device).float() / hidden_size)
    angles_TD = torch.outer(torch.arange(seq_length, device=device).float(), frequencies_D)
    return torch.cat((angles_TD.sin(), angles_TD.cos()), dim=-1)


def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """fp32 [N] slopes 2^(-8(i+1)/n) (Press et al. 2022). Where N is no power of two: the slopes of the power of two
    below, then every second slope of the one above."""

    def of_power(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    below = 2 ** int(math.log2(num_heads))
    slopes = of_power(below) + of_power(2 * below)[::2][: num_heads - below]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def causal_mask(seq_length: int, documents_BT: Tensor | None, device: torch.device) -> Tensor:
    """Boolean [1 or B, 1, T, T]: True where the query (dim -2) may look at the key (dim -1): not ahead of it and,
    where documents are told apart, only inside its own document."""
    mask = torch.ones(seq_length, seq_length, dtype=torch.bool, device=device).tril()[None, None]
    if documents_BT is not None:
        mask = mask & (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])
    return mask


def document_blocks(documents_BT: Tensor) -> BlockMask:
    """`causal_mask` for FlexAttention, which skips blocks of scores that no query may see: its cost grows with the sum
    of squared document lengths, and no [T, T] mask is kept (Dong et al. 2024).

    torch's `create_block_mask` makes that mask once, to look at it. Here a block of tokens is known by its least and its largest
    document: two blocks may see each other where these ranges meet, and wholly where both hold one and the same document.
    """
    ids_BT = documents_BT.int()

    def visible(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (ids_BT[batch, query] == ids_BT[batch, key])

    seq_length = ids_BT.shape[1]
    padded_BT = F.pad(ids_BT, (0, -seq_length % BLOCK), value=torch.iinfo(ids_BT.dtype).max)  # no block that ends late is whole
    least_BQ, most_BQ = padded_BT.unflatten(-1, (-1, BLOCK)).aminmax(dim=-1)
    meet_BQQ = (least_BQ[:, :, None] <= most_BQ[:, None]) & (least_BQ[:, None] <= most_BQ[:, :, None])
    alone_BQ = least_BQ == most_BQ
    whole_BQQ = (meet_BQQ & alone_BQ[:, :, None] & alone_BQ[:, None]).tril(-1)
    parts, wholes = _ordered(meet_BQQ.tril() & ~whole_BQQ), _ordered(whole_BQQ)
    return BlockMask.from_kv_blocks(*parts, *wholes, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(seq_length, seq_length))


def _ordered(seen_BQQ: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries how many blocks of keys it sees, [B, 1, Q], and their numbers, the others behind them."""
    numbers = seen_BQQ.int().argsort(dim=-1, descending=True, stable=True)
    return seen_BQQ.sum(-1, dtype=torch.int32)[:, None], numbers.int()[:, None]


def mask_of_positions(positions_BT: Tensor, num_keys: int) -> Tensor:
    """Boolean [B, 1, T, S]: True where a query at its position may look at the key of position 0 .. S - 1."""
    return torch.arange(num_keys, device=positions_BT.device) <= positions_BT[:, None, :, None]


def alibi_bias(slopes_N: Tensor, mask: Tensor, dtype: torch.dtype, queries_BT: Tensor | None = None) -> Tensor:
    """[1 or B, N, T, S] to add to the scores: -slope * distance where the mask allows, -inf elsewhere.

    Args:
        queries_BT: index of each query among the keys, where it is not its index among the queries.
    """
    if queries_BT is None:
        queries_BT = torch.arange(mask.shape[-2], device=mask.device)[None]
    distance_BTS = (torch.arange(mask.shape[-1], device=mask.device) - queries_BT[..., None]).float()
    bias = slopes_N[:, None, None] * distance_BTS[:, None]
    return bias.masked_fill(~mask, float("-inf")).to(dtype)
