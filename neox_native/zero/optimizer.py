"""The sharded optimizer: stages 0 to 3 of ZeRO around any elementwise `torch.optim` optimizer.

[Note: a step] For every microbatch the caller announces the backward pass (`microbatch`) and runs it; hooks do the
rest. Then `step`:

    reduce   what the last backward pass has not reduced yet; gradients that are partial over other groups, too
    clip     one all-reduce of one number over all ranks gives the norm, and whether a gradient is not finite
    update   this rank's fp32 master shards
    gather   nothing yet: parameters are stale, and come in the next forward pass, one unit ahead of their use

Nothing in it waits for the device: norm, clipping and the decision to skip the update stay tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from neox_native.zero import collectives
from neox_native.zero.bucket import GradientBucket, Reducer
from neox_native.zero.costs import Costs, unit_costs
from neox_native.zero.gather import Gatherer, inside_backward
from neox_native.zero.gradients import Trained, sum_partial
from neox_native.zero.layout import ZeroStage
from neox_native.zero.state import as_global, optimizer_state, state_mesh
from neox_native.zero.unit import ParameterSpec, Unit, local_gradient
from neox_native.zero.weights import Draw, UnitWeights

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
NORM_EPSILON = 1e-6
"""Added to the norm before dividing by it, as in torch's clip_grad_norm_."""


class StageUnits:
    """The units of one pipeline stage, with their weights and gradients, in the order in which they run."""

    def __init__(
        self,
        units: Sequence[Unit],
        group: dist.ProcessGroup,
        stage: ZeroStage,
        param_dtype: torch.dtype,
        device: torch.device,
    ):
        self.units = units
        self.weights = [UnitWeights(unit.specs, group, stage, param_dtype, device) for unit in units]
        self.buckets = [GradientBucket(weights.trained_layout, group, stage, device) for weights in self.weights]
        self.reducer = Reducer(self.buckets, stage)
        self.gatherer = Gatherer(self.weights, releases=stage == ZeroStage.PARAMETERS)

    def trained(self) -> list[Trained]:
        """Every trainable parameter."""
        return [
            Trained(spec, shard, gradient, slot.span(weights.rank)[0])
            for weights, bucket in zip(self.weights, self.buckets)
            for spec, slot, shard, gradient in zip(weights.specs, weights.layout.slots, weights.shards, bucket.shards)
        ]

    def install_hooks(self, gather: bool) -> None:
        """Collect gradients as they come; with `gather`, make parameters present when modules run."""
        for index, (unit, bucket) in enumerate(zip(self.units, self.buckets)):
            for position in range(len(bucket.shards)):
                parameter = self.weights[index].specs[position].parameter
                parameter.register_post_accumulate_grad_hook(lambda _p, i=index, j=position: self._on_gradient(i, j))
            if gather:
                self.gatherer.install(index, unit.readers)
        self.units[0].readers[0].register_forward_pre_hook(lambda _module, _inputs: self._on_forward())

    @torch.no_grad()
    def absorb(self) -> None:
        """Take every gradient that lies in `.grad`, which no hook has seen."""
        for weights, bucket in zip(self.weights, self.buckets):
            for position in range(len(bucket.shards)):
                self._take(weights.specs[position], bucket, position)

    def _on_forward(self) -> None:
        """Hook: the stage's forward pass begins, unless this is an evaluation, or a recomputation."""
        if torch.is_grad_enabled() and not inside_backward():
            self.reducer.forget()

    def _on_gradient(self, index: int, position: int) -> None:
        """Hook: autograd has finished the gradient of parameter `position` of unit `index`."""
        bucket = self.buckets[index]
        bucket.arrived.add(position)
        self.gatherer.through_with(index, position, everything=bucket.complete)
        self._take(self.weights[index].specs[position], bucket, position)
        self.reducer.notice()

    def _take(self, spec: ParameterSpec, bucket: GradientBucket, position: int) -> None:
        if spec.parameter.grad is not None:
            self.reducer.settle(bucket)
            bucket.accumulate(position, local_gradient(spec))
            spec.parameter.grad = None


class ShardedOptimizer:
    """Owns parameters, gradients and optimizer state of this rank's part of the model. See [Note: a step].

    Args:
        units_by_stage: for each pipeline stage of this rank, under the number by which `microbatch` names it, its units
            in the order in which they run.
        mesh: the whole mesh, with an axis "dp".
        stage: what to shard over dp. On one data-parallel rank there is nothing to shard: every stage is stage 0.
        make_optimizer: parameter groups (decayed, and not decayed: `weight_decay` 0) -> optimizer. With `fused=True`,
            clipping, unscaling and skipping cost neither a pass over the gradients nor a wait for the device;
            otherwise both.
        param_dtype: type of the parameters that the model reads.
        device: where everything lives.
    """

    def __init__(
        self,
        units_by_stage: Mapping[int, Sequence[Unit]],
        mesh: DeviceMesh,
        stage: ZeroStage,
        make_optimizer: MakeOptimizer,
        param_dtype: torch.dtype,
        device: torch.device,
    ):
        self.device, self.make_optimizer = device, make_optimizer
        self.dp_group = mesh.get_group("dp")
        self.stage = ZeroStage(stage) if dist.get_world_size(self.dp_group) > 1 else ZeroStage.NONE
        self.mesh = mesh
        self.stages = {
            number: StageUnits(units, self.dp_group, self.stage, param_dtype, device)
            for number, units in units_by_stage.items()
        }

    def materialize(self, draw: Draw) -> None:
        """Fill masters and parameters, one parameter in memory at a time, make the optimizer, install the hooks.

        Args:
            draw: initial value of a parameter's tp-local shard, in fp32.
        """
        for stage_units in self.stages.values():
            for weights in stage_units.weights:
                weights.materialize(draw)
            stage_units.install_hooks(gather=self.stage != ZeroStage.NONE)
        self.trained = [trained for stage_units in self.stages.values() for trained in stage_units.trained()]
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        """Make the optimizer over the master shards, and its state: an update with zero gradients at rate zero creates
        it, and it starts from zeros."""
        groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
        for trained in self.trained:
            trained.shard.grad = trained.gradient.zero_()
            groups[0 if trained.spec.decay else 1]["params"].append(trained.shard)
        self.optimizer = self.make_optimizer(groups)
        self.fused = all(group.get("fused") for group in self.optimizer.param_groups)
        self._set_learning_rate(0.0)
        self.optimizer.step()
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def time_waits(self, waiting: collectives.Waiting) -> None:
        """Put every wait for a collective in forward and backward passes inside a block of `waiting`."""
        for stage_units in self.stages.values():
            for waits in (*stage_units.weights, *stage_units.buckets):
                waits.waiting = waiting

    def microbatch(self, stage_index: int, last: bool) -> None:
        """A backward pass of pipeline stage `stage_index` begins; `last` if no other of this step follows. A caller
        that cannot tell says False: `step` reduces then, without overlap."""
        self.stages[stage_index].gatherer.settle()
        self.stages[stage_index].reducer.begin(last)

    def absorb(self, stage_index: int) -> None:
        """A weight-gradient pass of a zero-bubble schedule ended: no hook fires in it."""
        self.stages[stage_index].absorb()

    @torch.no_grad()
    def step(
        self,
        lr: float | Tensor,
        clip: float,
        loss_scale: Tensor | None = None,
        loss: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Update the weights with the gradients that were collected since the last step.

        Args:
            lr: learning rate, perhaps a scalar on the device.
            clip: largest global L2 norm of the gradient; 0 does not clip.
            loss_scale: what the loss was multiplied by, a scalar on the device.
            loss: this rank's share of the loss: not finite on any rank, it makes the norm not finite on all.
            skip: a scalar, the same on all ranks; not zero, it skips the update.

        Returns:
            The global norm of the unscaled gradient before clipping, and 1.0 if the update was skipped (the norm is not
            finite, or `skip`), else 0.0; both fp32 scalars on the device.
        """
        self._reduce()
        norm = self._global_norm(loss)
        if loss_scale is not None:
            norm = norm / loss_scale
        found_inf = 1.0 - norm.isfinite().float()
        if skip is not None:
            found_inf = torch.maximum(found_inf, skip.float())
        divisor = None if loss_scale is None else loss_scale.float()
        if clip > 0:
            excess = ((norm + NORM_EPSILON) / clip).clamp(min=1.0)
            divisor = excess if divisor is None else divisor * excess
        self._update(lr, divisor, found_inf)
        self._publish(frozen_too=False)
        return norm, found_inf

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the model and of the optimizer under global names. See [Note: global state].

        `model.NAME`: the fp32 master weights, the only copy of the weights. `optimizer.STATE.NAME`: a moment.
        `optimizer.STATE`: a scalar, like the number of updates. The tensors share memory with the live state: to load,
        fill them in place, then call `after_load`.
        """
        result: dict[str, Tensor] = {}
        for stage_units in self.stages.values():
            for weights in stage_units.weights:
                for spec, slot, shard in zip(weights.specs, weights.layout.slots, weights.shards):
                    result[f"model.{spec.name}"] = self._global(spec, shard, slot.span(weights.rank)[0])
        for trained in self.trained:
            for name, value in optimizer_state(self.optimizer, trained.shard).items():
                if value.dim():
                    result[f"optimizer.{name}.{trained.spec.name}"] = self._global(trained.spec, value, trained.first_row)
                else:
                    result.setdefault(f"optimizer.{name}", value)
        return result

    @torch.no_grad()
    def after_load(self) -> None:
        """Make parameters and scalar state follow what was loaded into the tensors of `state_dict`."""
        if self.trained:
            first, *rest = (optimizer_state(self.optimizer, trained.shard) for trained in self.trained)
            for name, value in first.items():
                for state in rest if not value.dim() else ():
                    state[name].copy_(value)
        self._publish(frozen_too=True)

    def specs(self) -> list[ParameterSpec]:
        """Every parameter, frozen ones too."""
        return [spec for units in self.stages.values() for weights in units.weights for spec in weights.specs]

    def gradients(self) -> dict[str, Tensor]:
        """After a step and before the next forward pass: the gradient of each trainable parameter, reduced, clipped."""
        return {each.spec.name: self._global(each.spec, each.gradient, each.first_row) for each in self.trained}

    def costs(self, num_microbatches: int) -> Costs:
        """Bytes that this rank holds between steps and moves over dp in a step of so many microbatches."""
        dp, rank = dist.get_world_size(self.dp_group), dist.get_rank(self.dp_group) if self.stage else 0
        num_moments = 0
        if self.trained:
            state = optimizer_state(self.optimizer, self.trained[0].shard)
            num_moments = sum(value.dim() > 0 for value in state.values())
        total = Costs()
        for stage_units in self.stages.values():
            for unit in stage_units.weights:
                layouts = unit.layout, unit.trained_layout
                total += unit_costs(*layouts, self.stage, dp, rank, unit.dtype.itemsize, num_moments, num_microbatches)
        return total

    @cached_property
    def state_mesh(self) -> DeviceMesh:
        """See `state.state_mesh`."""
        return state_mesh(self.mesh)

    def _global(self, spec: ParameterSpec, shard: Tensor, first_row: int) -> Tensor:
        return as_global(spec, shard, self.state_mesh, self.stage != ZeroStage.NONE, first_row)

    def _reduce(self) -> None:
        """Finish the reductions over dp; then sum what is partial over other groups, one all-reduce per group."""
        for stage_units in self.stages.values():
            stage_units.reducer.finish()
        sum_partial(self.trained)

    def _global_norm(self, loss: Tensor | None) -> Tensor:
        """L2 norm of the whole model's gradient, every element counted once. Not finite if any element is not, or the
        loss of any rank."""
        replicas = 1 if self.stage else dist.get_world_size(self.dp_group)
        counted = [piece for trained in self.trained for piece in trained.counted]
        norm = torch.nn.utils.get_total_norm(counted) if counted else torch.zeros((), device=self.device)
        square = norm.double().square() / replicas
        if loss is not None:
            square = square + 0.0 * loss
        if dist.get_world_size() > 1:
            dist.all_reduce(square)
        return square.sqrt().float()

    def _set_learning_rate(self, lr: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _update(self, lr: float | Tensor, divisor: Tensor | None, found_inf: Tensor) -> None:
        """Update the masters with the gradients over `divisor`, unless `found_inf`."""
        self._set_learning_rate(lr)
        if self.fused:  # the kernel divides, and skips
            self.optimizer.grad_scale, self.optimizer.found_inf = divisor, found_inf
            self.optimizer.step()
        elif not found_inf.item():  # waits for the device
            if divisor is not None and self.trained:
                torch._foreach_div_([trained.gradient for trained in self.trained], divisor)
            self.optimizer.step()

    def _publish(self, frozen_too: bool) -> None:
        """The masters have changed: bring the parameters up to date, or let them be gathered when they are used."""
        for stage_units in self.stages.values():
            for weights in stage_units.weights:
                weights.refresh()
            if self.stage:
                stage_units.gatherer.expire(frozen_too)
