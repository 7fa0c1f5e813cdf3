"""One optimizer step: microbatches -> gradients -> clip -> update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from neox_native.data.loader import StepBatch
from neox_native.engine.dropout import DropoutSeeds
from neox_native.engine.objective import NextToken, Objective
from neox_native.engine.single_stage import Engine
from neox_native.engine.spikes import SpikeGuard
from neox_native.fixed_point import RoundedSums
from neox_native.mesh import Mesh
from neox_native.model.auxiliary import AuxiliaryLoss
from neox_native.optim.loss_scale import LossScale
from neox_native.parallel.pipeline import Fields
from neox_native.zero.optimizer import ShardedOptimizer


class StepResult(NamedTuple):
    """Tensors on the device; reading one waits for it."""

    loss: Tensor
    """This rank's share of the mean loss per token [nats]; `Losses.total` makes the step's loss of it."""
    grad_norm: Tensor
    """Global L2 norm before clipping, the same on all ranks."""
    skipped: Tensor
    """Not zero where loss or gradient were not finite, or the loss a spike, so that nothing was updated."""
    metrics: dict[str, Tensor]
    """This rank's shares of named metrics, divided by the step's weight as the loss is."""


class StepLoss:
    """The loss function of one step's microbatches; it collects the objective's metrics as it goes.

    Args:
        fields: the step's `loss_fields`, on the device.
        weight: of the step on all ranks, once `weighing` is done.
        scale: what the loss is multiplied by, for fp16.
    """

    def __init__(
        self, objective: Objective, fields: Fields, weight: Tensor, weighing: dist.Work | None = None, scale: Tensor | float = 1.0
    ):
        self.objective, self.fields, self.weight, self.weighing, self.scale = objective, fields, weight, weighing, scale
        self.metrics: dict[str, list[Tensor]] = {}
        """For each microbatch the sum of each metric."""

    def factor(self) -> Tensor:
        """What a microbatch's sum is multiplied by: the loss scale over the step's weight."""
        if self.weighing is not None:
            self.weighing.wait()  # it had the first forward pass to finish
        return self.scale / self.weight.clamp(min=1)

    def __call__(self, values_BT: Tensor, microbatch: int) -> Tensor:
        """The microbatch's share of the step's loss, scaled."""
        loss, metrics = self.objective(values_BT, {name: field[microbatch] for name, field in self.fields.items()})
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(value.detach())
        return loss * self.factor()


class Losses:
    """The loss of a step, the same in every layout: the objective's sum / its weight over all ranks.

    Args:
        sums: how losses and metrics of microbatches add up.
    """

    def __init__(self, mesh: Mesh, device: torch.device, objective: Objective | None = None, sums: RoundedSums | None = None):
        self.mesh, self.device, self.objective, self.sums = mesh, device, objective or NextToken(), sums or RoundedSums()

    def function(self, batch: StepBatch, scale: Tensor | float = 1.0) -> StepLoss:
        """The loss function of the microbatches of this data rank's share of a step."""
        # An integer, exact in any order; filled in on the device, since a copy of a number on the host waits for the device.
        weight = torch.full((), self.objective.weight(batch), dtype=torch.int64, device=self.device)
        weighing = dist.all_reduce(weight, group=self.mesh.rows.group, async_op=True)
        return StepLoss(self.objective, to_device(batch.loss_fields, self.device), weight, weighing, scale)

    def sums_of(self, batch: StepBatch) -> StepLoss:
        """The loss function that sums the objective over microbatches and divides by nothing."""
        return StepLoss(self.objective, to_device(batch.loss_fields, self.device), torch.ones((), dtype=torch.int64, device=self.device))

    def total(self, share: Tensor) -> Tensor:
        """The whole step's loss, in fp64, from each rank's share, one of `sums.share`."""
        total = self.sums.ready(share)
        for axis in self.mesh.loss_shares:
            dist.all_reduce(total, group=axis.group)
        return self.sums.value(total)

    def totals(self, shares: Sequence[Tensor | None]) -> Tensor:
        """The same of metrics [n], of which any rank may have shares."""
        nothing = self.sums.share(torch.zeros(1, device=self.device))
        total = self.sums.ready(torch.stack([nothing if share is None else share for share in shares]))
        dist.all_reduce(total)
        return self.sums.value(total)


class TrainStep:
    """Runs one step. Reduction of gradients over ranks is the optimizer's.

    Args:
        clip_grad_norm: largest global L2 norm of the gradient; 0 does not clip.
        loss_scale: for fp16.
        spike_guard: skips updates of losses that leap; costs an all-reduce of the loss in every step.
        dropout_seeds: decide which elements are dropped.
    """

    def __init__(
        self,
        engine: Engine,
        optimizer: ShardedOptimizer,
        losses: Losses,
        clip_grad_norm: float,
        loss_scale: LossScale | None = None,
        spike_guard: SpikeGuard | None = None,
        dropout_seeds: DropoutSeeds | None = None,
    ):
        self.engine, self.optimizer, self.losses = engine, optimizer, losses
        self.clip_grad_norm, self.loss_scale, self.spike_guard = clip_grad_norm, loss_scale, spike_guard
        self.dropout_seeds = dropout_seeds or DropoutSeeds(losses.mesh)
        modules = (module for part in engine.parts.values() for module in part.modules())
        self.auxiliary = [module for module in modules if isinstance(module, AuxiliaryLoss)]
        self.metrics = {*losses.objective.metrics, *(each.name for each in self.auxiliary)}
        """Names of the metrics that this rank has a share of."""

    def __call__(self, batch: StepBatch, learning_rate: float | Tensor) -> StepResult:
        """Train on one step's batch. Nothing waits for the device."""
        fields = to_device(batch.model_fields, self.losses.device)
        scale = None
        if self.loss_scale:
            scale = self.loss_scale.of_step(len(fields["tokens_BT"]) * self.losses.mesh.rows.size)
        function = self.losses.function(batch, 1.0 if scale is None else scale)
        fields |= self._for_auxiliary(function, len(fields["tokens_BT"]))
        self.optimizer.begin(scale)
        losses_M = self.engine.forward_backward(fields, function, self.dropout_seeds(batch))
        if scale is not None:
            losses_M = losses_M / scale
        loss = self.losses.sums.share(losses_M)
        spike = self.spike_guard.is_spike(self.losses.total(loss)) if self.spike_guard else None
        grad_norm, skipped = self.optimizer.step(learning_rate, self.clip_grad_norm, scale, losses_M, spike)
        if self.loss_scale:
            self.loss_scale.update(1.0 - grad_norm.isfinite().float())
        return StepResult(loss, grad_norm, skipped, self._shares(function))

    def _for_auxiliary(self, function: StepLoss, num_microbatches: int) -> dict[str, Tensor]:
        """What a model with auxiliary losses needs besides; waits for the step's weight."""
        device = self.losses.device
        for each in self.auxiliary:
            each.sums = torch.zeros(num_microbatches, device=device)
        if not self.auxiliary:
            return {}
        numbers = torch.arange(num_microbatches, device=device)[:, None]
        return {"loss_weight": function.factor().expand(num_microbatches, 1), "microbatch": numbers}

    def _shares(self, function: StepLoss) -> dict[str, Tensor]:
        """This rank's shares of the metrics. Ranks of one tensor-parallel group have the same values: the first one counts."""
        terms = dict(function.metrics) if self.losses.mesh.tensor.rank == 0 else {}
        for each in self.auxiliary:
            terms[each.name] = [*terms.get(each.name, []), *each.sums]
        weight = function.weight.clamp(min=1)
        return {name: self.losses.sums.share(torch.stack(values) / weight) for name, values in terms.items()}


def to_device(fields: Fields, device: torch.device) -> dict[str, Tensor]:
    """The same fields on the device; nothing waits for pinned memory."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in fields.items()}
