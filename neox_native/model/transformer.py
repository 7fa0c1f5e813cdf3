"""The NeoX decoder, whole or in part.

Shapes: B microbatch, T sequence, D hidden, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial

import torch
import torch.nn as nn
from torch import Tensor

from neox_native.config.schema import Model, Run
from neox_native.model import initialize, positions
from neox_native.model.auxiliary import Auxiliary
from neox_native.model.block import Block, block_cards
from neox_native.model.cache import Cache
from neox_native.model.kinds import kinds_of_layers
from neox_native.model.masks import seed_masks
from neox_native.model.parameters import Card, Cards, normal, under
from neox_native.model.readout import Readout, readout_cards


def embedding_cards(model: Model) -> Cards:
    """Each parameter's card, by its global name."""
    init = normal(initialize.standard_deviation(model.init, model))
    found: Cards = {"embed_in.weight": Card((model.padded_vocab_size, model.hidden_size), init, cut=0, role="embedding")}
    if model.pos_emb == "learned":
        found["embed_pos.weight"] = Card((model.seq_length, model.hidden_size), init, role="embedding")
    return found


@cache
def cards(model: Model) -> Cards:
    """Each parameter's card, by its global name, in the order of the forward pass. See [Note: cards]."""
    found = embedding_cards(model)
    for number, kinds in enumerate(kinds_of_layers(model)):
        found |= under(f"layers.{number}", block_cards(model, kinds))
    return found | readout_cards(model)


class Transformer(nn.Module):
    """A decoder, or the part of one that holds some of its layers.

    Parameter names are GPT-NeoX's and carry global layer numbers, so that a part's state is a subset of the whole's.

    Args:
        model: the [model] section.
        layers: global numbers of the layers to hold; all of them by default.
        first: hold the embedding; without it `forward` takes hidden states instead of tokens.
        last: hold the readout; without it `forward` returns hidden states.
        seed: of the initial weights, as `run.seed`; on the meta device there are none.
    """

    def __init__(
        self,
        model: Model,
        layers: Iterable[int] | None = None,
        first: bool = True,
        last: bool = True,
        seed: int = Run.seed,
    ):
        super().__init__()
        self.config = model
        layers, kinds = range(model.num_layers) if layers is None else layers, kinds_of_layers(model)
        vocab_size, hidden_size = model.padded_vocab_size, model.hidden_size
        self.embed_in = nn.Embedding(vocab_size, hidden_size) if first else None
        self.embed_pos = nn.Embedding(model.seq_length, hidden_size) if first and model.pos_emb == "learned" else None
        self.embedded = nn.Identity()  # see [Note: seams]
        self.dropout = nn.Dropout(model.hidden_dropout)
        self.layers = nn.ModuleDict({str(number): Block(model, kinds[number]) for number in layers})
        self.readout = Readout(model) if last else None
        self.tie()
        self.initialize(seed)
        self.build_tables(torch.get_default_device())

    def tie(self) -> None:
        """Make the head's matrix the embedding's, where the config ties them and both are here."""
        if self.config.tie_embeddings and self.embed_in is not None and self.readout is not None:
            self.readout.embed_out.weight = self.embed_in.weight

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fill the parameters with what a run of this seed starts from, in every layout."""
        described = cards(self.config)
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(initialize.draw(self.global_name(name), described[self.global_name(name)], seed))

    def global_name(self, name: str) -> str:
        """The name under which a parameter of this part is known in the whole model."""
        name = name.removeprefix("readout.")
        return "embed_in.weight" if self.config.tie_embeddings and name == "embed_out.weight" else name

    def build_tables(self, device: torch.device) -> None:
        """Compute the constant position tables, in fp32, on `device`; again after a move from the meta device."""
        model, cos, sin, table, slopes = self.config, None, None, None, None
        if model.pos_emb == "rotary":
            rotary_dim = int(model.head_dim * model.rotary_pct)
            cos, sin = positions.rotary_tables(rotary_dim, model.seq_length, model.rotary_base, device)
        elif model.pos_emb == "sinusoidal":
            table = positions.sinusoidal_table(model.seq_length, model.hidden_size, device)
        elif model.pos_emb == "alibi":
            slopes = positions.alibi_slopes(model.num_heads, device)
        for name, tensor in (("cos", cos), ("sin", sin), ("sinusoids", table), ("slopes", slopes)):
            self.register_buffer(name, tensor, persistent=False)

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
        """Token embeddings plus, where the config has them, absolute position embeddings: [B, T] -> [B, T, D]."""
        x_BTD = self.embed_in(tokens_BT)
        if self.embed_pos is not None:
            if positions_BT is None:
                positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
            x_BTD = x_BTD + self.embed_pos(positions_BT)
        elif self.sinusoids is not None:
            table = self.sinusoids[: tokens_BT.shape[1]] if positions_BT is None else self.sinusoids[positions_BT]
            x_BTD = x_BTD + table.to(x_BTD.dtype)
        return self.dropout(self.embedded(x_BTD))

    def attends_in_blocks(self, device: torch.device) -> bool:
        """Whether FlexAttention serves packed documents: it has no backward pass on a CPU, and no dropout. ALiBi adds
        to the scores, which takes a mask of numbers."""
        return device.type == "cuda" and self.slopes is None and not self.config.attention_dropout

    def context(
        self, seq_length: int, positions_BT: Tensor | None, documents_BT: Tensor | None, cache: Cache | None
    ) -> positions.Context:
        """What the blocks need of positions for rows of `seq_length` tokens."""
        cos, sin, mask = self.cos, self.sin, None
        if cos is not None and positions_BT is not None:
            cos, sin = cos[positions_BT], sin[positions_BT]
        if cache is not None:
            if cache.needs_mask or self.slopes is not None:
                mask = positions.mask_of_positions(cache.positions_BT, cache.num_keys)
            if self.slopes is not None:
                dtype = next(self.parameters()).dtype
                mask = positions.alibi_bias(self.slopes, mask, dtype, cache.positions_BT)
            return positions.Context(cos, sin, mask)
        if documents_BT is not None and self.attends_in_blocks(documents_BT.device):
            return positions.Context(cos, sin, positions.document_blocks(documents_BT))
        if documents_BT is not None or self.slopes is not None:
            device = documents_BT.device if documents_BT is not None else self.slopes.device
            mask = positions.causal_mask(seq_length, documents_BT, device)
            if self.slopes is not None:
                mask = positions.alibi_bias(self.slopes, mask, next(self.parameters()).dtype)
        return positions.Context(cos, sin, mask)

    def forward(
        self,
        x: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: Cache | None = None,
        readout_B: Tensor | None = None,
        targets_BT: Tensor | None = None,
        loss_weight: Tensor | None = None,
        microbatch: Tensor | None = None,
        dropout_seed: int | None = None,
    ) -> Tensor:
        """Tokens [B, T] (hidden states [B, T, D] without the embedding) -> what the readout says of them: logits [B, T, V],
        or values per token [B, T] with `targets_BT`; hidden states [B, T, D] without a readout.

        Args:
            positions_BT: position of each token where it is not its index in the row.
            documents_BT: document number of each token; attention then stays inside a document.
            cache: what the layers remember of earlier tokens; `x` goes where it was told to place them.
            readout_B: index in T of the one token of each row whose logits are wanted; they come as [B, 1, V].
            targets_BT: token that follows each token, -100 where that does not count.
            loss_weight, microbatch: see `Auxiliary`; both or none.
            dropout_seed: what the masks of this forward pass are drawn by; see [Note: masks].
        """
        if cache is not None:
            positions_BT = cache.positions_BT
        # Hidden states may be cut along the sequence, so their shape does not tell its length.
        of_length = positions_BT if positions_BT is not None else x if self.embed_in is not None else None
        seq_length = self.config.seq_length if of_length is None else of_length.shape[1]
        context = self.context(seq_length, positions_BT, documents_BT, cache)
        if loss_weight is not None:
            context = context._replace(step=Auxiliary(loss_weight, microbatch))
        if self.embed_in is not None:
            seed_masks(x.device, dropout_seed)
            x = self.embed(x, positions_BT)
        for number, layer in self.layers.items():
            if dropout_seed is not None:
                context = context._replace(seed=initialize.seed_of(dropout_seed, f"layers.{number}"))
            if cache is not None:
                context = context._replace(remember=partial(cache.extend, number))
            x = layer(x, context)
        if self.readout is not None:
            if readout_B is not None:
                x = x[torch.arange(len(x), device=x.device), readout_B][:, None]
            x = self.readout(x, targets_BT)
        return x
