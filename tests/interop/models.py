"""Small models with weights in which everything matters, as checkpoints of ours."""

from __future__ import annotations

from pathlib import Path

import torch

from neox_native.config.schema import Model
from neox_native.interop import checkpoints
from neox_native.model.initialize import seed_of
from neox_native.model.transformer import Transformer

SMALL = Model(num_layers=3, hidden_size=32, num_heads=4, seq_length=32, vocab_size=257, vocab_multiple_of=16)
TOKENS = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(0))


def draw(model: Model) -> checkpoints.Read:
    """Weights of a size that makes attention and logits lively, by name."""
    shapes = checkpoints.parameter_shapes(model)

    def read(name: str) -> torch.Tensor:
        noise = torch.randn(shapes[name], generator=torch.Generator().manual_seed(seed_of(7, name)))
        is_norm_weight = "norm" in name and name.endswith("weight")
        return 1 + 0.2 * noise if is_norm_weight else 0.2 * noise

    return read


def checkpoint(path: Path, model: Model = SMALL, **about) -> Path:
    """A checkpoint of the drawn weights."""
    checkpoints.write_checkpoint(path, model, draw(model), about)
    return path


def built(model: Model, read: checkpoints.Read) -> Transformer:
    """The model with these weights."""
    whole = Transformer(model)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(read(whole.global_name(name)))
    return whole


def weights(read: checkpoints.Read, model: Model) -> dict[str, torch.Tensor]:
    """Every parameter by name."""
    return {name: read(name) for name in checkpoints.parameter_shapes(model)}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Bitwise."""
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
