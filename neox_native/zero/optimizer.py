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

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neox_native.fixed_point import LIMBS, FixedGradients, limbs, value_of
from neox_native.zero import collectives
from neox_native.zero.layout import ZeroStage
from neox_native.zero.order import UnitsOfStage
from neox_native.zero.spec import ParameterSpec, Rule, Unit
from neox_native.zero.state import as_global, optimizer_state
from neox_native.zero.unit import Draw, ShardedUnit

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
NORM_EPSILON = 1e-6
"""Added to the norm before dividing by it, as in torch's clip_grad_norm_."""


@dataclass(frozen=True)
class Trained:
    """One trainable parameter and what this rank keeps of it, in fp32."""

    spec: ParameterSpec
    shard: Tensor
    """Master weights."""
    gradient: Tensor
    """After a step: its gradient, reduced and clipped."""
    sum: Tensor
    """What becomes the gradient while it is summed: integers, or the gradient itself."""
    first_row: int
    """The row of the tp-local parameter with which both begin."""
    unit: ShardedUnit

    def own_and_copied(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the gradient's rows, or their sums, those that this tp rank has alone, and those of which others have copies."""
        own = len(rows) if self.spec.shared is None else max(0, len(self.spec.shared.own) - self.first_row)
        return rows[:own], rows[own:]

    @property
    def counted(self) -> list[Tensor]:
        """What of the gradient this rank counts in the global norm."""
        own, copied = self.own_and_copied(self.gradient)
        pieces = [own, copied] if self.spec.shared is not None and self.spec.shared.counted else [own]
        return [piece for piece in pieces if piece.numel()] if self.spec.counted else []


class ShardedOptimizer:
    """Owns parameters, gradients and optimizer state of this rank's part of the model. See [Note: a step].

    Args:
        units_by_stage: for each pipeline stage of this rank, under the number by which `microbatch` names it, its units
            in the order in which they run.
        zero_stage: what to shard over each unit's group.
        make_optimizer: parameter groups, one for each `Rule` -> optimizer. A group that does not decay has `weight_decay`
            0. With `fused=True`, clipping, unscaling and skipping cost neither a pass over the gradients nor a wait for
            the device; otherwise both.
        param_dtype: type of the parameters that the model reads.
        device: where everything lives.
        fixed: adds gradients up as integers, so that their sums do not depend on the layout. Then `begin` tells of each step.
    """

    def __init__(
        self,
        units_by_stage: Mapping[int, Sequence[Unit]],
        zero_stage: ZeroStage,
        make_optimizer: MakeOptimizer,
        param_dtype: torch.dtype,
        device: torch.device,
        fixed: FixedGradients | None = None,
    ):
        self.device, self.make_optimizer, self.fixed = device, make_optimizer, fixed
        self.units_of_stage = {
            number: UnitsOfStage(
                [ShardedUnit(unit, zero_stage, param_dtype, device, fixed) for unit in units],
                keeps_end=len(units_by_stage) == 1,  # other stages would run meanwhile, and need the memory
            )
            for number, units in units_by_stage.items()
        }
        self.units = [unit for units in self.units_of_stage.values() for unit in units.units]

    def materialize(self, draw: Draw) -> None:
        """Fill masters and parameters, one parameter in memory at a time, make the optimizer, install the hooks.

        Args:
            draw: initial value of a parameter's tp-local shard, in fp32.
        """
        for unit in self.units:
            unit.materialize(draw)
        for units in self.units_of_stage.values():
            units.install_hooks()
        self.trained = [
            Trained(spec, shard, gradient, partial, slot.span(unit.rank)[0], unit)
            for unit in self.units
            for spec, slot, shard, gradient, partial in zip(
                unit.specs, unit.layout.slots, unit.shards, unit.gradients.shards, unit.gradients.sums
            )
        ]
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        """Make the optimizer over the master shards, and its state: an update with zero gradients at rate zero creates
        it, and it starts from zeros."""
        rules = {trained.spec.rule for trained in self.trained} or {Rule()}
        in_order = sorted(rules, key=lambda rule: (not rule.decay, rule.lr_multiplier))
        groups = {rule: rule.settings() for rule in in_order}
        for trained in self.trained:
            trained.shard.grad = trained.gradient.zero_()
            groups[trained.spec.rule]["params"].append(trained.shard)
        self.optimizer = self.make_optimizer(list(groups.values()))
        self.fused = all(group.get("fused") for group in self.optimizer.param_groups)
        self._set_learning_rate(0.0)
        self.optimizer.step()
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def time_waits(self, waiting: collectives.Waiting) -> None:
        """Put every wait for a collective in forward and backward passes inside a block of `waiting`."""
        for unit in self.units:
            unit.waiting = unit.gradients.waiting = waiting

    def microbatch(self, stage_index: int, last: bool) -> None:
        """A backward pass of pipeline stage `stage_index` begins; `last` if no other of this step follows. A caller
        that cannot tell says False: `step` reduces then, without overlap."""
        self.units_of_stage[stage_index].begin(last)

    def absorb(self) -> None:
        """A weight-gradient pass of a zero-bubble schedule ended: no hook fires in it. Its stage may read a parameter that
        belongs to a unit of another one, as a tied head does."""
        for units in self.units_of_stage.values():
            units.absorb()

    def begin(self, loss_scale: Tensor | None) -> None:
        """A step begins, whose loss is multiplied by `loss_scale`."""
        if self.fixed is not None:
            self.fixed.begin(loss_scale)

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
            loss: this rank's shares of the loss, of any shape: one that is not finite makes the norm not finite on all ranks.
            skip: a scalar, the same on all ranks; not zero, it skips the update.

        Returns:
            The global norm of the unscaled gradient before clipping, and 1.0 if the update was skipped (the norm is not
            finite, or `skip`), else 0.0; both fp32 scalars on the device.
        """
        self._reduce()
        for unit in self.units:
            unit.gradients.settle()
        norm = self._global_norm(loss) if self.fixed is None else self._fixed_norm(self.fixed, loss)
        if loss_scale is not None:
            loss_scale = loss_scale if self.fixed is None else loss_scale / self.fixed.shift
            norm = norm / loss_scale
        found_inf = 1.0 - norm.isfinite().float()
        if skip is not None:
            found_inf = torch.maximum(found_inf, skip.float())
        divisor = None if loss_scale is None else loss_scale.float()
        if clip > 0:
            excess = ((norm + NORM_EPSILON) / clip).clamp(min=1.0)
            divisor = excess if divisor is None else divisor * excess
        self._update(lr, divisor, found_inf)
        for unit in self.units:
            unit.expire()
        return norm, found_inf

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the model and of the optimizer under global names. See [Note: global state].

        `model.NAME`: the weights, once: the fp32 masters of trained parameters; frozen ones in the type that the model
        reads, for they have no other copy. `optimizer.STATE.NAME`: a moment. `optimizer.STATE`: a scalar, like the number
        of updates. The tensors share memory with the live state: to load, fill them in place, from tensors of any type,
        then call `after_load`.
        """
        result: dict[str, Tensor] = {}
        for unit in self.units:
            for spec, slot, shard in zip(unit.specs, unit.layout.slots, unit.shards):
                result[f"model.{spec.name}"] = as_global(spec, shard, unit, slot.span(unit.rank)[0])
        for trained in self.trained:
            for name, value in optimizer_state(self.optimizer, trained.shard).items():
                if value.dim():
                    whole = as_global(trained.spec, value, trained.unit, trained.first_row)
                    result[f"optimizer.{name}.{trained.spec.name}"] = whole
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
        for unit in self.units:
            unit.expire(frozen_too=True)

    def specs(self) -> list[ParameterSpec]:
        """Every parameter, frozen ones too."""
        return [spec for unit in self.units for spec in unit.specs]

    def _reduce(self) -> None:
        """Finish the reductions over the units' groups; then sum what is partial over others, one all-reduce per group."""
        for units in self.units_of_stage.values():
            units.finish()
        partial: dict[str, tuple[dist.ProcessGroup, list[Tensor]]] = {}
        for trained in self.trained:
            for group in trained.spec.sum_over:
                partial.setdefault(group.group_name, (group, []))[1].append(trained.sum)
            _, copied = trained.own_and_copied(trained.sum)
            if copied.numel():
                group = trained.spec.shared.group
                partial.setdefault(group.group_name, (group, []))[1].append(copied)
        for group, sums in partial.values():
            flat = torch.cat([each.flatten() for each in sums])
            collectives.all_reduce(flat, group).wait()
            pieces = flat.split([each.numel() for each in sums])
            torch._foreach_copy_(sums, [piece.view_as(like) for piece, like in zip(pieces, sums)])

    def _global_norm(self, loss: Tensor | None) -> Tensor:
        """L2 norm of the whole model's gradient, every element counted once. Not finite if any element is not, or the
        loss of any rank."""
        counted: dict[int, list[Tensor]] = defaultdict(list)
        for trained in self.trained:
            counted[trained.unit.num_replicas] += trained.counted
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        for num_replicas, pieces in counted.items():
            if pieces:
                square = square + torch.nn.utils.get_total_norm(pieces).double().square() / num_replicas
        if loss is not None:
            square = square + 0.0 * loss.sum()
        if dist.get_world_size() > 1:
            dist.all_reduce(square)
        return square.sqrt().float()

    def _fixed_norm(self, fixed: FixedGradients, loss: Tensor | None) -> Tensor:
        """What `_global_norm` returns, from a sum of limbs; NaN where it is not finite."""
        square = torch.zeros(LIMBS, dtype=torch.int64, device=self.device)
        square[-1] = fixed.faults()
        if loss is not None:
            square[-1] += (~loss.isfinite()).sum()
        first = [each for each in self.trained if each.unit.replicas is None or dist.get_rank(each.unit.replicas) == 0]
        if counted := [piece for trained in first for piece in trained.counted]:
            square = square + limbs(counted, squared=True, piece=fixed.piece)
        if dist.get_world_size() > 1:
            dist.all_reduce(square)
        return value_of(square).sqrt().float()

    def _set_learning_rate(self, lr: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]

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
