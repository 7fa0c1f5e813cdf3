"""What all ranks must decide together: skipped updates, and which elements to drop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neox_native.config.schema import Config, Parallel, Training
from neox_native.data.loader import StepBatch
from neox_native.engine.build import build_engine, build_model
from neox_native.engine.dropout import DropoutSeeds
from neox_native.engine.spikes import SpikeGuard
from neox_native.engine.step import Losses, TrainStep
from neox_native.launch import Ranks
from neox_native.mesh import build_mesh
from neox_native.optim.loss_scale import LossScale
from neox_native.reliability.replicas import check_replicas
from neox_native.train.state import copies
from neox_native.zero.optimizer import ShardedOptimizer
from tests.ranks import run_ranks
from tests.train.runs import CPU, batch, close, config_of, serial, shards, train

THREE_AXES = Parallel(pp=2, dp=2, tp=2, zero_stage=1)


def first_step(config: Config, damage: float = 0.0, spikes: bool = False) -> tuple[float, float, float, bool]:
    """One step in which one data rank's weights were multiplied by `damage`; whether it was skipped, the loss scale
    after it, this rank's own loss, and whether its weights moved."""
    mesh = build_mesh(config.parallel, CPU)
    parts, optimizer = build_model(config, mesh, CPU)
    engine, losses = build_engine(config, mesh, CPU, parts, optimizer), Losses(mesh, CPU)
    scale = LossScale(config.training, CPU) if config.training.precision == "fp16" else None
    guard = SpikeGuard(config.training, CPU) if spikes else None
    if guard:
        guard.state[:-1], guard.state[-1] = torch.arange(guard.window) / 1e3, guard.window  # losses near zero so far
    if damage and mesh.rows.rank == 1:
        next(iter(parts.values())).layers["0" if mesh.pipeline.rank == 0 else "2"].input_layernorm.weight.data.mul_(damage)
    place = tuple(mesh.place.values())
    before = shards(optimizer, place, "shard")
    seeds = DropoutSeeds(mesh, config.run.seed, config.parallel.sequence_parallel)
    step = TrainStep(engine, optimizer, losses, config.training.clip_grad_norm, scale, guard, seeds)
    result = step(batch(config, 0, place[1], masked=False), config.optimizer.lr)
    after = shards(optimizer, place, "shard")
    moved = any(not torch.equal(before.of[name][1], after.of[name][1]) for name in before.of)
    return result.skipped.item(), scale.scale.item() if scale else 1.0, result.loss.item(), moved


def test_an_fp16_overflow_is_agreed_by_all_ranks():
    config = config_of(THREE_AXES, precision="fp16", initial_loss_scale=2.0**40, loss_scale_hysteresis=1)
    outcomes = run_ranks(8, first_step, config)
    assert all(skipped == 1 and scale == 2.0**39 and not moved for skipped, scale, _, moved in outcomes)


def flushed_logit_gradients(num_tokens: int) -> list[float]:
    """Share of the logits' gradients that are zero in a step of so many tokens, with the loss scale of a whole step and
    with that of its microbatches of 8192 tokens. Logits are those of a trained model: of deviation 2, over 50304 tokens."""
    losses, scale = Losses(build_mesh(Parallel(dp=1), CPU), CPU), LossScale(Training(), CPU)
    logits = torch.randn(1, 64, 50304, generator=torch.Generator().manual_seed(0)).mul(2.0).half().requires_grad_()
    found = []
    for factor in (scale.scale, scale.of_step(num_tokens // 8192)):
        values = F.cross_entropy(logits.float().mT, torch.zeros(1, 64, dtype=torch.int64), reduction="none")
        loss = losses.function(StepBatch({}, {}, 0, 0, num_tokens), factor)(values, 0)
        (gradient,) = torch.autograd.grad(loss, logits)
        found.append((gradient == 0).float().mean().item())
    return found


def test_gradients_of_a_long_step_stay_within_fp16():
    ((flushed_before, flushed),) = run_ranks(1, flushed_logit_gradients, 2**21)
    assert flushed_before > 0.8 and flushed < 0.03


@pytest.mark.parametrize("parallel", [Parallel(dp=1), Parallel(dp=4, zero_stage=2, zero_shard_size=2), Parallel(pp=2, dp=2)], ids=str)
def test_the_loss_scale_means_the_same_in_every_layout(parallel):
    """It is small enough here for gradients to flush to zero if it acted on the mean of the step's 8 microbatches."""
    config = config_of(parallel, precision="fp16", initial_loss_scale=2.0**-12, min_loss_scale=2.0**-12)
    for outcome in run_ranks(parallel.pp * parallel.dp, train, config):
        close(outcome.losses, serial("parallel", "sgd", False)[0].losses, relative=2e-4)
        close(outcome.norms, serial("parallel", "sgd", False)[0].norms, relative=5e-3)


def test_a_loss_that_is_not_finite_on_one_replica_skips_the_update_on_all():
    outcomes = run_ranks(8, first_step, config_of(replace(THREE_AXES, zero_stage=0)), float("inf"))
    assert all(skipped == 1 and not moved for skipped, _, _, moved in outcomes)


def test_a_spike_skips_the_update_on_all_ranks():
    config = config_of(THREE_AXES, spike_threshold=4.0, spike_window=8)
    outcomes = run_ranks(8, first_step, config, 0.0, True)
    assert all(skipped == 1 and not moved for skipped, _, _, moved in outcomes)
    assert all(skipped == 0 and moved for skipped, _, _, moved in run_ranks(8, first_step, config))


def difference_after(config: Config, name: str, drift: Callable[[Tensor, ShardedOptimizer], None]) -> str | None:
    """What the comparison of replicas says when rank 3 alone has let its shard of parameter `name`, or its state, drift."""
    mesh = build_mesh(config.parallel, CPU)
    _, optimizer = build_model(config, mesh, CPU)
    ranks = Ranks()
    assert check_replicas(copies(config, mesh, optimizer), ranks) is None
    if ranks.rank == 3:
        (shard,) = [t.shard for t in optimizer.trained if t.spec.name == name]
        drift(shard, optimizer)
    return check_replicas(copies(config, mesh, optimizer), ranks)


def test_copies_of_a_key_value_head_are_compared():
    config = config_of(Parallel(dp=1, tp=4), "grouped odd tied")
    name = "layers.2.attention.query_key_value.weight"
    for found in run_ranks(4, difference_after, config, name, lambda shard, _: shard[-1, -1].add_(1)):
        assert found.startswith("layers.2.attention.query_key_value.weight differs between the tp replicas [2, 3]")


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind, name", [("shard", ""), ("exp_avg_sq", "exp_avg_sq of ")])
def test_masters_and_moments_of_groups_are_compared(kind, name, stage):
    config = config_of(Parallel(dp=4, zero_stage=stage, zero_shard_size=2), optimizer="adamw", precision="bf16")

    def drift(shard: Tensor, optimizer: ShardedOptimizer) -> None:
        (shard if kind == "shard" else optimizer.optimizer.state[shard][kind]).view(-1)[-1] += 1e-5

    for found in run_ranks(4, difference_after, config, "layers.2.mlp.dense_h_to_4h.weight", drift):
        assert found == f"{name}layers.2.mlp.dense_h_to_4h.weight differs between the dp replicas [1, 3]: rank 3 is not like the others"


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_ranks_drop_the_same_elements_of_the_same_residual_stream(sequence_parallel):
    config = config_of(Parallel(dp=1, tp=2, sequence_parallel=sequence_parallel))
    config = replace(config, model=replace(config.model, hidden_dropout=0.3))
    losses = [loss for _, _, loss, _ in run_ranks(2, first_step, config)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses == [loss for _, _, loss, _ in run_ranks(2, first_step, config)]
    plain = [loss for _, _, loss, _ in run_ranks(2, first_step, config_of(config.parallel))]
    assert abs(losses[0] - plain[0]) > 1e-4
