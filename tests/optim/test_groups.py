"""What decays, and the optimizer of the config."""

from __future__ import annotations

import pytest
import torch

from neox_native.config.schema import Model, Optimizer
from neox_native.model.transformer import Transformer
from neox_native.optim.groups import decays, optimizer_factory


def test_biases_and_norms_do_not_decay_and_everything_else_does() -> None:
    with torch.device("meta"):
        model = Transformer(Model(num_layers=2, pos_emb="learned"))
    names = [model.global_name(name) for name, _ in model.named_parameters()]
    decayed = {name.replace("layers.0.", "").replace("layers.1.", "") for name in names if decays(name)}
    assert decayed == {
        "embed_in.weight",
        "embed_pos.weight",
        "embed_out.weight",
        "attention.query_key_value.weight",
        "attention.dense.weight",
        "mlp.dense_h_to_4h.weight",
        "mlp.dense_4h_to_h.weight",
    }


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_factory_makes_what_the_config_says(name: str) -> None:
    settings = Optimizer(name=name, lr=0.5, betas=[0.8, 0.7], eps=1e-3, weight_decay=0.3, momentum=0.6)
    decayed, plain = torch.zeros(2), torch.zeros(2)
    optimizer = optimizer_factory(settings)([{"params": [decayed]}, {"params": [plain], "weight_decay": 0.0}])
    first, second = optimizer.param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (0.3, 0.0)
    assert first["lr"] == 0.5 and first["fused"]
    if name == "adamw":
        assert isinstance(optimizer, torch.optim.AdamW) and first["betas"] == (0.8, 0.7) and first["eps"] == 1e-3
    else:
        assert isinstance(optimizer, torch.optim.SGD) and first["momentum"] == 0.6
