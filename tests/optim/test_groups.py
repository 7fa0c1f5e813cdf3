"""The optimizer of the config."""

from __future__ import annotations

import pytest
import torch

from neox_native.config.schema import Optimizer
from neox_native.optim.groups import optimizer_factory


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
