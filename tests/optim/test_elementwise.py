"""Updates whose elements do not depend on how the tensor is cut."""

from __future__ import annotations

import pytest
import torch

from neox_native.config.schema import Optimizer
from neox_native.optim.groups import optimizer_factory

RULES = {
    "adamw": Optimizer(lr=3e-3, weight_decay=0.1, betas=[0.9, 0.95]),
    "momentum": Optimizer(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd": Optimizer(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.1),
}
SIZE = 5000


def trained(rule: str, cuts: list[int], own: bool = True, skipped: int = 3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weights and state after 6 updates of a tensor in pieces, one of which is skipped."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(SIZE, generator=generator) * torch.logspace(-8, 1, SIZE)
    shards = [piece.clone() for piece in weights.tensor_split(cuts)]
    optimizer = optimizer_factory(RULES[rule], elementwise=own)([{"params": shards}])
    for number in range(6):
        gradients = torch.randn(SIZE, generator=generator) * torch.logspace(1, -8, SIZE)
        for shard, gradient in zip(shards, gradients.tensor_split(cuts)):
            shard.grad = gradient.clone()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.7), torch.tensor(float(number == skipped))
        optimizer.step()
    names = optimizer.state[shards[0]]
    state = {name: torch.cat([optimizer.state[shard][name].reshape(-1) for shard in shards]) for name in names}
    return torch.cat(shards), state


@pytest.mark.parametrize("rule", RULES)
def test_an_element_is_updated_alike_in_shards_of_any_length(rule):
    whole, state = trained(rule, [])
    for cuts in [*range(1, 40)], [*range(0, SIZE, 12)], [7, 4001]:
        weights, moments = trained(rule, cuts)
        assert torch.equal(weights, whole)
        assert all(torch.equal(moments[name], state[name]) for name in state if name != "step")


@pytest.mark.parametrize("rule", RULES)
def test_an_update_is_torchs_to_rounding(rule):
    (found, state), (expected, its_state) = trained(rule, []), trained(rule, [], own=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert list(state) == list(its_state)
    for name, value in state.items():
        torch.testing.assert_close(value, its_state[name], rtol=1e-5, atol=1e-6)
