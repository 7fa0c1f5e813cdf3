"""The closed forms count what the model holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from neox_native.config.schema import Model
from neox_native.model import flops
from neox_native.model.kinds import kinds_of_layers
from neox_native.model.transformer import Transformer

BASE = Model(num_layers=3, hidden_size=32, num_heads=4, seq_length=16, vocab_size=100, vocab_multiple_of=64)
VARIANTS = {
    "neox": BASE,
    "grouped queries": replace(BASE, num_kv_heads=2),
    "gated": replace(BASE, activation="swiglu", ffn_hidden_size=80),
    "no biases": replace(BASE, attention_bias=False, mlp_bias=False),
    "rmsnorm": replace(BASE, norm="rmsnorm"),
    "tied": replace(BASE, tie_embeddings=True),
    "learned positions": replace(BASE, pos_emb="learned"),
    "sequential": replace(BASE, parallel_residual=False),
    "several sorts of layers": replace(BASE, pattern=["attention", "attention+feed_forward"]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_closed_form_counts_the_parameters_of_the_module(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(VARIANTS[name])
    assert flops.total_parameters(VARIANTS[name]) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_costs_count_the_operations_of_the_module(name: str) -> None:
    variant, batch = VARIANTS[name], 2
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # attention there is of every pair of positions
        Transformer(variant)(torch.empty(batch, variant.seq_length, dtype=torch.int64)).sum().backward()
    costs = [kind.costs(variant) for kinds in kinds_of_layers(variant) for kind in kinds]
    per_token = sum(6 * each.multiply_adds + each.model_flops for each in costs) + 6 * variant.hidden_size * variant.padded_vocab_size
    assert counter.get_total_flops() == batch * variant.seq_length * per_token


def test_20b_has_its_published_counts() -> None:
    model = Model(num_layers=44, hidden_size=6144, num_heads=64, vocab_size=50432)
    assert flops.total_parameters(model) == 20_554_567_680
    assert flops.total_parameters(model) - 2 * 50432 * 6144 == 19_934_859_264


def test_tying_changes_no_operation() -> None:
    assert flops.model_flops_per_token(VARIANTS["tied"]) == flops.model_flops_per_token(BASE)


def test_operations_follow_the_papers_formula() -> None:
    parameters = flops.total_parameters(BASE) - 128 * 32
    assert flops.model_flops_per_token(BASE) == 6 * parameters + 12 * 3 * 32 * 16
    assert flops.model_flops_per_token(BASE, causal=True) == 6 * parameters + 6 * 3 * 32 * 16
