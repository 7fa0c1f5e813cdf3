"""One optimizer step: microbatches -> gradients -> clip -> update."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from neox_native.data.loader import StepBatch
from neox_native.engine.single_stage import Engine
from neox_native.engine.spikes import SpikeGuard
from neox_native.optim.loss_scale import LossScale
from neox_native.parallel.loss import cross_entropy_sum
from neox_native.parallel.pipeline import LossFunction
from neox_native.zero.optimizer import ShardedOptimizer


class StepResult(NamedTuple):
    """Tensors on the device; reading one waits for it."""

    loss: Tensor
    """This rank's share of the mean loss per token [nats]: the sum over dp and pp is the step's loss."""
    grad_norm: Tensor
    """Global L2 norm before clipping, the same on all ranks."""
    skipped: Tensor
    """Not zero where loss or gradient were not finite, or the loss a spike, so that nothing was updated."""


class Losses:
    """The loss of a step, the same in every layout: sum over its tokens / their number over all ranks."""

    def __init__(self, mesh: DeviceMesh, device: torch.device):
        self.dp_group, self.pp_group, self.device = mesh.get_group("dp"), mesh.get_group("pp"), device
        self.tp_group = mesh.get_group("tp") if mesh["tp"].size() > 1 else None

    def function(self, num_targets: int, scale: Tensor | float = 1.0) -> LossFunction:
        """The loss function of a step's microbatches: (logits, targets) -> scale * share of the step's mean loss.

        Args:
            num_targets: tokens of this data rank's share of the step that count.
        """
        num_tokens = torch.full((), num_targets, dtype=torch.float32, device=self.device)
        counting = dist.all_reduce(num_tokens, group=self.dp_group, async_op=True)

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            counting.wait()  # it had the first forward pass to finish
            return cross_entropy_sum(logits, target, self.tp_group) * (scale / num_tokens.clamp(min=1.0))

        return loss

    def total(self, share: Tensor) -> Tensor:
        """The whole step's value from each rank's share: the sum over dp and pp, in fp64."""
        value = share.detach().to(torch.float64, copy=True)
        for group in (self.dp_group, self.pp_group):
            dist.all_reduce(value, group=group)
        return value


class TrainStep:
    """Runs one step. Reduction of gradients over ranks is the optimizer's.

    Args:
        clip_grad_norm: largest global L2 norm of the gradient; 0 does not clip.
        loss_scale: for fp16.
        spike_guard: skips updates of losses that leap; costs an all-reduce of the loss in every step.
    """

    def __init__(
        self,
        engine: Engine,
        optimizer: ShardedOptimizer,
        losses: Losses,
        clip_grad_norm: float,
        loss_scale: LossScale | None = None,
        spike_guard: SpikeGuard | None = None,
    ):
        self.engine, self.optimizer, self.losses = engine, optimizer, losses
        self.clip_grad_norm, self.loss_scale, self.spike_guard = clip_grad_norm, loss_scale, spike_guard

    def __call__(self, batch: StepBatch, learning_rate: float | Tensor) -> StepResult:
        """Train on one step's batch. Nothing waits for the device."""
        inputs, targets, extras = to_device(batch, self.losses.device)
        scale = None
        if self.loss_scale:
            scale = self.loss_scale.of_step(len(inputs) * dist.get_world_size(self.losses.dp_group))
        function = self.losses.function(batch.num_targets, 1.0 if scale is None else scale)
        loss = self.engine.forward_backward(inputs, targets, extras, function)
        if scale is not None:
            loss = loss / scale
        spike = self.spike_guard.is_spike(self.losses.total(loss)) if self.spike_guard else None
        grad_norm, skipped = self.optimizer.step(learning_rate, self.clip_grad_norm, scale, loss, spike)
        if self.loss_scale:
            self.loss_scale.update(1.0 - grad_norm.isfinite().float())
        return StepResult(loss, grad_norm, skipped)


def to_device(batch: StepBatch, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Inputs, targets and further arguments of the model's forward, each [M, B, T], on the device."""
    extras = {"documents_BT": batch.document_ids, "positions_BT": batch.positions}
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in extras.items() if tensor is not None}
    return batch.inputs.to(device, non_blocking=True), batch.targets.to(device, non_blocking=True), moved
