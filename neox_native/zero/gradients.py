"""Gradients after their reduction over dp: what is partial over other groups, and what counts in the norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from neox_native.zero import collectives
from neox_native.zero.unit import ParameterSpec


@dataclass(frozen=True)
class Trained:
    """One trainable parameter and what this rank keeps of it, in fp32."""

    spec: ParameterSpec
    shard: Tensor
    """Master weights."""
    gradient: Tensor
    """After a step: its gradient, reduced and clipped."""
    first_row: int
    """Of the tp-local parameter in both."""

    @property
    def own_and_copied(self) -> tuple[Tensor, Tensor]:
        """The gradient's rows that this tp rank has alone, and those of which others have copies."""
        own = len(self.gradient) if self.spec.shared is None else max(0, len(self.spec.shared.own) - self.first_row)
        return self.gradient[:own], self.gradient[own:]

    @property
    def counted(self) -> list[Tensor]:
        """What of the gradient this rank counts in the global norm."""
        own, copied = self.own_and_copied
        pieces = [own, copied] if self.spec.shared is not None and self.spec.shared.counted else [own]
        return [piece for piece in pieces if piece.numel()] if self.spec.counted else []


def sum_partial(parameters: Sequence[Trained]) -> None:
    """Sum what is partial over other groups than dp, in place: one all-reduce per group."""
    partial: dict[str, tuple[dist.ProcessGroup, list[Tensor]]] = {}
    for trained in parameters:
        for group in trained.spec.sum_over:
            partial.setdefault(group.group_name, (group, []))[1].append(trained.gradient)
        _, copied = trained.own_and_copied
        if copied.numel():
            group = trained.spec.shared.group
            partial.setdefault(group.group_name, (group, []))[1].append(copied)
    for group, gradients in partial.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        collectives.all_reduce(flat, group).wait()
        pieces = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [piece.view_as(like) for piece, like in zip(pieces, gradients)])
