"""torch's fused AdamW and SGD with one result for an element, whatever tensor it lies in.

A kernel on a CPU computes whole vectors with other instructions than a tensor's last few elements, which fill none: one
may join a product and a sum that the other rounds apart. A shard of another length then has other last digits. Here the
ends of all tensors are updated a second time, side by side in a tensor of whole vectors, and that result counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VECTOR = 64
"""A multiple of the elements of any CPU's vectors."""


class Elementwise(torch.optim.Optimizer):
    """Comes before a fused optimizer of torch among the bases of a class; `kernel` is that optimizer."""

    kernel: Any
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter."""
        cut = [[shard for shard in group["params"] if shard.numel() % VECTOR] for group in self.param_groups]
        ends = [self._ends(group, shards) for group, shards in zip(self.param_groups, cut) if shards]
        super().step(closure)
        for each, shards in zip(ends, filter(None, cut)):
            each.step()
            results = _tensors(each, each.param_groups[0]["params"])
            for name, tensors in _tensors(self, shards).items():
                places = [_end(tensor) for tensor in tensors]
                rows = results[name][0].view(-1, VECTOR)
                torch._foreach_copy_(places, [row[: len(place)] for row, place in zip(rows, places)])

    def _ends(self, group: dict[str, Any], shards: list[Tensor]) -> torch.optim.Optimizer:
        """An optimizer of one tensor: the ends of `shards`, with their gradients and states from before the update."""
        tensors = {name: _padded(tensors) for name, tensors in _tensors(self, shards).items()}
        whole, whole.grad = tensors.pop("weight"), tensors.pop("gradient")
        optimizer = self.kernel([{**group, "params": [whole]}])
        scalars = {name: value.clone() for name, value in self.state[shards[0]].items() if not value.dim()}
        optimizer.state[whole] = scalars | tensors
        optimizer.grad_scale, optimizer.found_inf = self.grad_scale, self.found_inf
        return optimizer


class AdamW(Elementwise, torch.optim.AdamW):
    """See `Elementwise`."""

    kernel = torch.optim.AdamW


class SGD(Elementwise, torch.optim.SGD):
    """See `Elementwise`."""

    kernel = torch.optim.SGD


def _tensors(optimizer: torch.optim.Optimizer, shards: list[Tensor]) -> dict[str, list[Tensor]]:
    """What an update reads and writes of shards, by name."""
    states = [optimizer.state[shard] for shard in shards]
    kept = {name: [state[name] for state in states] for name, value in states[0].items() if value.dim()}
    return {"weight": shards, "gradient": [shard.grad for shard in shards]} | kept


def _end(tensor: Tensor) -> Tensor:
    """The elements that fill no whole vector."""
    flat = tensor.view(-1)
    return flat[len(flat) // VECTOR * VECTOR :]


def _padded(tensors: list[Tensor]) -> Tensor:
    """The ends of tensors, each with zeros after it."""
    rows = tensors[0].new_zeros(len(tensors), VECTOR)
    ends = [_end(tensor) for tensor in tensors]
    torch._foreach_copy_([row[: len(end)] for row, end in zip(rows, ends)], ends)
    return rows.view(-1)
