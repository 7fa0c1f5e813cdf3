"""What a step does besides training: skipping, evaluation in between, memory of stage 3, gradients no hook sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from neox_native.zero.spec import local
from neox_native.zero.unit import ShardedUnit
from tests.ranks import run_ranks
from tests.zero.toy import Case, backward, batch, gather, learning_rate, loss_of, run_sharded, sharded

STAGES = (0, 1, 2, 3)


def everything(optimizer) -> dict[str, Tensor]:
    """A copy of all state."""
    return {name: local(value).clone() for name, value in optimizer.state_dict().items()}


def overflow(case: Case, poison: float) -> tuple[list[float], list[float], bool, bool]:
    """Three steps, in the second one rank's gradient is spoilt. Flags, norms, whether state stood still, then moved."""
    model, optimizer = sharded(case, 2)
    flags, norms, states = [], [], [everything(optimizer)]
    for step in range(3):
        backward(model, optimizer, case, step, 2)
        if step == 1:
            optimizer.microbatch(0, last=True)
            factor = poison if dist.get_rank() == 1 else 1.0
            (loss_of(model, batch(step)[:1]) * factor).backward()
        norm, found_inf = optimizer.step(learning_rate(case), case.clip)
        flags.append(found_inf.item())
        norms.append(norm.item())
        states.append(everything(optimizer))
    still = all(torch.equal(states[1][name], states[2][name]) for name in states[1])
    moved = any(not torch.equal(states[2][name], states[3][name]) for name in states[2])
    return flags, norms, still, moved


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
def test_a_gradient_that_is_not_finite_stops_the_update_on_all_ranks(optimizer: str) -> None:
    for stage, poison in ((2, float("nan")), (3, float("inf"))):
        case = Case(stage=stage, optimizer=optimizer)
        for flags, norms, still, moved in run_ranks(2, overflow, case, poison):
            assert flags == [0.0, 1.0, 0.0] and still and moved
            assert not torch.tensor(norms[1]).isfinite()


def evaluations(case: Case) -> list[float]:
    """Losses of forward passes without gradient, before, between and after steps."""
    model, optimizer = sharded(case, 2)
    losses = []
    for step in range(3):
        with torch.no_grad():
            losses += [loss_of(model, batch(step)).item(), loss_of(model, batch(9)).item()]
        backward(model, optimizer, case, step, 2)
        with torch.no_grad():  # in the midst of a step
            losses.append(loss_of(model, batch(9)).item())
        optimizer.step(learning_rate(case), case.clip)
    with torch.no_grad():
        losses.append(loss_of(model, batch(9)).item())
    return losses


def test_evaluation_may_come_at_any_time() -> None:
    results = [run_ranks(2, evaluations, Case(stage=stage))[0] for stage in STAGES]
    for losses in results[1:]:
        assert losses == pytest.approx(results[0], rel=1e-6)


def idle_steps(case: Case) -> dict[str, Tensor]:
    """Steps with nothing between them: zero gradients, so momentum and decay alone."""
    model, optimizer = sharded(case, 2)
    backward(model, optimizer, case, 0, 2)
    for _ in range(2):
        optimizer.step(learning_rate(case), case.clip)
    backward(model, optimizer, case, 1, 2)
    optimizer.step(learning_rate(case), case.clip)
    return gather(optimizer, "shard")


def test_a_step_without_microbatches_has_zero_gradients() -> None:
    results = [run_ranks(2, idle_steps, Case(stage=stage))[0] for stage in STAGES]
    for weights in results[1:]:
        for name, weight in results[0].items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)


def gathered_bytes(case: Case) -> tuple[int, int, int]:
    """Most bytes of full parameters at a time, bytes of the two largest units together, bytes between steps."""
    model, optimizer = sharded(case, 2)
    units = optimizer.units
    most = 0

    def now() -> int:
        return sum(storage.untyped_storage().nbytes() for unit in units for storage in unit.storages)

    finish = ShardedUnit.make_present

    def watched(self: ShardedUnit) -> None:
        nonlocal most
        finish(self)
        most = max(most, now())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ShardedUnit, "make_present", watched)
        for step in range(2):
            backward(model, optimizer, case, step, 2)
            optimizer.step(learning_rate(case), case.clip)
    sizes = sorted(sum(storage.numel() * storage.element_size() for storage in unit.storages) for unit in units)
    return most, sizes[-1] + sizes[-2], now()


@pytest.mark.parametrize("recompute", [False, True])
def test_stage_3_holds_two_units_at_most_and_none_between_steps(recompute: bool) -> None:
    case = Case(stage=3, recompute=recompute, unused=True, frozen=("blocks.0.up.weight",))
    most, two_units, between = run_ranks(2, gathered_bytes, case)[0]
    assert 0 < most <= two_units and between == 0


def absorbed(case: Case) -> dict[str, Tensor]:
    """Gradients that arrive in `.grad` without any hook, as the weight passes of zero-bubble schedules leave them."""
    model, optimizer = sharded(case, 2)
    for step in range(case.steps):
        rows = batch(step).chunk(2)[dist.get_rank()]
        for micro in rows.chunk(case.accumulation):
            trained = [trained.spec.parameter for trained in optimizer.trained]
            optimizer.microbatch(0, last=False)
            gradients = torch.autograd.grad(loss_of(model, micro), trained)
            for parameter, gradient in zip(trained, gradients):
                parameter.grad = gradient
            optimizer.absorb()
        optimizer.step(learning_rate(case), case.clip)
    return gather(optimizer, "shard")


@pytest.mark.parametrize("stage", [0, 1])
def test_gradients_that_no_hook_saw_are_absorbed(stage: int) -> None:
    case = Case(stage=stage)
    hooked = run_ranks(2, run_sharded, replace(case), 2)[0].weights
    for name, weight in run_ranks(2, absorbed, case)[0].items():
        torch.testing.assert_close(weight, hooked[name], rtol=0, atol=1e-6)
