"""Our decoder against two small Hugging Face `GPTNeoXForCausalLM` models: logits, loss and gradients."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neox_native.config.schema import Model
from neox_native.model.transformer import Transformer

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(params=["parallel", "sequential"])
def golden(request):
    with np.load(GOLDENS / f"neox_{request.param}_residual.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def load(golden) -> Transformer:
    config = json.loads(str(golden["config"]))
    model = Transformer(
        Model(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            ffn_hidden_size=config["intermediate_size"],
            seq_length=config["max_position_embeddings"],
            vocab_size=config["vocab_size"],
            vocab_multiple_of=1,
            rotary_pct=config["rotary_pct"],
            parallel_residual=config["use_parallel_residual"],
        )
    )
    weights = {name.removeprefix("weight/"): torch.from_numpy(a) for name, a in golden.items() if "weight/" in name}
    model.load_state_dict({name: weights[model.global_name(name)] for name in model.state_dict()})
    return model


def test_logits_equal_hugging_face(golden):
    logits = load(golden)(torch.from_numpy(golden["input_ids"]))
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), rtol=0, atol=1e-4)


def test_gradient_norms_equal_hugging_face(golden):
    model, tokens = load(golden), torch.from_numpy(golden["input_ids"])
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert loss.item() == pytest.approx(float(golden["loss"]), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(float(golden[f"grad_norm/{model.global_name(name)}"]), rel=1e-3), name
