"""AdamW and SGD whose result for an element does not depend on the tensor that the element lies in.

A fused kernel computes the last few elements of a tensor with other instructions than the rest, and a compiler may join a
product and a sum in the one and not in the other. A shard of another length then has other last digits. Here every
operation rounds once, so that there is nothing to join. Pieces stay in the cache, which makes up for most of the passes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

PIECES = {"cpu": 1 << 15, "cuda": 1 << 24}
"""Elements that are updated at a time."""


class Elementwise(torch.optim.Optimizer):
    """Takes what a fused optimizer takes: `grad_scale`, which divides the gradient, and `found_inf`, which if not zero skips the
    update. Nothing waits for the device."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], **defaults: Any):
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        for name, like in self.first_state(parameter, group).items() if not state else ():
            state[name] = like
        moments = [value for value in state.values() if value.dim()]
        for gradient, *old in pieces([parameter.grad, parameter, *moments]):
            if self.grad_scale is not None:
                gradient = gradient / self.grad_scale
            for before, after in zip(old, self.updated(gradient, old, state, group)):
                self._put(before, after)
        if "step" in state:
            self._put(state["step"], state["step"] + 1)

    def _put(self, before: Tensor, after: Tensor) -> None:
        before.copy_(after if self.found_inf is None else torch.where(self.found_inf == 0, after, before))

    @abstractmethod
    def first_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state before the first update, under the names that torch's optimizer gives it; `step` counts updates."""

    @abstractmethod
    def updated(self, gradient: Tensor, old: list[Tensor], state: dict[str, Tensor], group: dict[str, Any]) -> tuple[Tensor, ...]:
        """The weights and moments after an update, from those before it, `old`."""


class AdamW(Elementwise):
    """Loshchilov & Hutter 2019, algorithm 2, as torch's AdamW: the rate multiplies the decay, too."""

    def first_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """See `Elementwise`."""
        mean, square = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return {"step": torch.zeros((), device=parameter.device), "exp_avg": mean, "exp_avg_sq": square}

    def updated(self, gradient: Tensor, old: list[Tensor], state: dict[str, Tensor], group: dict[str, Any]) -> tuple[Tensor, ...]:
        """See `Elementwise`."""
        (weights, mean, square), number = old, state["step"].double() + 1
        rate, (beta1, beta2) = group["lr"], group["betas"]
        mean = (mean * beta1).add_(gradient * (1 - beta1))
        square = (square * beta2).add_((gradient * gradient).mul_(1 - beta2))
        corrected = (square / (1 - beta2**number)).sqrt_().add_(group["eps"])
        update = (mean / (1 - beta1**number)).div_(corrected).mul_(rate)
        return (weights * (1 - rate * group["weight_decay"])).sub_(update), mean, square


class SGD(Elementwise):
    """Stochastic gradient descent with momentum, whose decay is added to the gradient, as torch's SGD."""

    def first_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """See `Elementwise`."""
        return {"momentum_buffer": torch.zeros_like(parameter)} if group["momentum"] else {}

    def updated(self, gradient: Tensor, old: list[Tensor], state: dict[str, Tensor], group: dict[str, Any]) -> tuple[Tensor, ...]:
        """See `Elementwise`."""
        weights, *buffers = old
        direction = gradient + weights * group["weight_decay"]
        for buffer in buffers:
            direction.add_(buffer * group["momentum"])
        return weights - direction * group["lr"], direction


def pieces(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Contiguous tensors of one shape, cut into flat pieces."""
    size = PIECES.get(tensors[0].device.type, PIECES["cpu"])
    yield from map(list, zip(*(tensor.view(-1).split(size) for tensor in tensors)))
