"""The decoder. See `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from neox_native.config.ranges import BelowOne, Positive, Range, Share, at_least_one


@dataclass(frozen=True)
class Model:
    """The NeoX decoder."""

    num_layers: Annotated[int, at_least_one(10_000)] = 6
    """Transformer blocks."""
    hidden_size: Annotated[int, at_least_one(1 << 20)] = 512
    """Width of the residual stream [channels]."""
    num_heads: Annotated[int, at_least_one(1 << 20)] = 8
    """Attention heads; must divide hidden_size."""
    num_kv_heads: Annotated[int, Range(largest=1 << 20)] = 0
    """Key and value heads for grouped-query attention; 0 means num_heads (multi-head attention). Where they are fewer
    than parallel.tp, each lies on several ranks."""
    ffn_hidden_size: Annotated[int, Range(largest=1 << 23)] = 0
    """Width of the feed-forward layer [channels]; 0 means 4 * hidden_size."""
    seq_length: Annotated[int, at_least_one(1 << 24)] = 2048
    """Sequence length of training [tokens]."""
    vocab_size: Annotated[int, at_least_one((1 << 31) - 1)] = 50277
    """Token ids that data may contain: 0 .. vocab_size - 1."""
    vocab_multiple_of: Annotated[int, at_least_one(1 << 20)] = 128
    """The embedding and the head have vocab_size rounded up to a multiple of this many rows, whatever the mesh."""
    pattern: list[str] = field(default_factory=lambda: ["attention+feed_forward"], hash=False)
    """Layer kinds of each layer, repeated over the layers: "attention+feed_forward" has both in one layer, joined in one
    residual step with parallel_residual, else one after the other."""
    pos_emb: Literal["rotary", "learned", "sinusoidal", "alibi", "none"] = "rotary"
    """Position embedding."""
    rotary_pct: Share = 0.25
    """Share of each head's channels that rotary embedding turns [fraction]."""
    rotary_base: Positive = 10000.0
    """Base of the rotary frequencies."""
    parallel_residual: bool = True
    """True: x + attention(norm1(x)) + mlp(norm2(x)); False: the kinds of a layer one after the other."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation."""
    norm_eps: Positive = 1e-5
    """Added to the variance inside the normalisation."""
    activation: Literal["gelu", "gelu_tanh", "relu", "silu", "geglu", "swiglu", "reglu"] = "gelu"
    """Activation of the feed-forward layer; geglu, swiglu and reglu add a gate projection."""
    attention_bias: bool = True
    """Biases on the query-key-value and the attention output projections."""
    mlp_bias: bool = True
    """Biases on the feed-forward projections."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head."""
    hidden_dropout: BelowOne = 0.0
    """Dropout on the embedding and on what is added to the residual stream: with parallel_residual the sum of attention and
    feed-forward, else each of them [probability]."""
    attention_dropout: BelowOne = 0.0
    """Dropout on attention weights [probability]."""
    init: Literal["small_init", "wang_init", "normal", "scaled_normal"] = "small_init"
    """Initialisation of embeddings, query-key-value, MLP-in and head."""
    output_init: Literal["small_init", "wang_init", "normal", "scaled_normal"] = "wang_init"
    """Initialisation of attention-out and MLP-out."""
    init_std: float = 0.02
    """Standard deviation of "normal" and "scaled_normal"."""

    @property
    def drops(self) -> bool:
        """Whether anything is dropped."""
        return max(self.hidden_dropout, self.attention_dropout) > 0

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return -(-self.vocab_size // self.vocab_multiple_of) * self.vocab_multiple_of

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def ffn_size(self) -> int:
        """Feed-forward width, resolved [channels]."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate projection."""
        return self.activation in ("geglu", "swiglu", "reglu")
