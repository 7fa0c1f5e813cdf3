"""Cards say of every parameter what the model holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from neox_native.config.load import load
from neox_native.config.schema import Model
from neox_native.errors import UserError
from neox_native.model.transformer import Transformer, cards

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = Model(num_layers=3, hidden_size=32, num_heads=4, seq_length=16, vocab_size=100, vocab_multiple_of=64)
MODELS = {str(path.relative_to(CONFIGS)): load(path, []).model for path in sorted(CONFIGS.rglob("*.toml"))} | {
    "gated, grouped": replace(SMALL, activation="swiglu", ffn_hidden_size=80, num_kv_heads=2, parallel_residual=False),
    "no biases": replace(SMALL, attention_bias=False, mlp_bias=False, norm="rmsnorm"),
    "tied": replace(SMALL, tie_embeddings=True, pos_emb="learned"),
    "pattern": replace(SMALL, pattern=["attention", "feed_forward+attention"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_cards_name_every_parameter_with_its_shape(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(MODELS[name])
    held = {model.global_name(local): tuple(parameter.shape) for local, parameter in model.named_parameters()}
    assert list(held.items()) == [(name, card.shape) for name, card in cards(MODELS[name]).items()]


def test_biases_and_norms_do_not_decay_and_everything_else_does() -> None:
    described = cards(Model(num_layers=2, pos_emb="learned"))
    decayed = {name.replace("layers.0.", "").replace("layers.1.", "") for name, card in described.items() if card.decay}
    assert decayed == {
        "embed_in.weight",
        "embed_pos.weight",
        "embed_out.weight",
        "attention.query_key_value.weight",
        "attention.dense.weight",
        "mlp.dense_h_to_4h.weight",
        "mlp.dense_4h_to_h.weight",
    }


@pytest.mark.parametrize("pattern, said", [(["mamba"], "the known are attention, feed_forward"), (["attention+attention"], "twice")])
def test_a_pattern_that_cannot_be_is_refused(pattern: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Transformer(replace(SMALL, pattern=pattern))
