"""State under global names goes from any number of ranks and any stage to any other."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from neox_native.zero.spec import local
from tests.ranks import run_ranks
from tests.zero import toy
from tests.zero.toy import Case, backward, gather, learning_rate, sharded

SAVED_AFTER, STEPS = 2, 4


def case_of(stage: int, dtype: torch.dtype, shard_size: int = 0) -> Case:
    """Accumulation 1, so that bf16 losses do not depend on how rows fall into microbatches."""
    return Case(stage=stage, shard_size=shard_size, optimizer="adamw", dtype=dtype, accumulation=1, frozen=("blocks.1.up.weight",))


def train(model, optimizer, case: Case, steps: range, dp: int) -> list[float]:
    """Losses of some steps."""
    losses = []
    for step in steps:
        loss = torch.tensor(backward(model, optimizer, case, step, dp))
        optimizer.step(learning_rate(case), case.clip)
        dist.all_reduce(loss)
        losses.append(loss.item())
    return losses


def save(case: Case, dp: int, path: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train, save, train on: the uninterrupted run."""
    model, optimizer = sharded(case, dp)
    train(model, optimizer, case, range(SAVED_AFTER), dp)
    dcp.save(optimizer.state_dict(), checkpoint_id=path)
    losses = train(model, optimizer, case, range(SAVED_AFTER, STEPS), dp)
    return losses, gather(optimizer, "shard")


def resume(case: Case, dp: int, path: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Forget everything, load, train on."""
    model, optimizer = sharded(case, dp)
    state = optimizer.state_dict()
    with torch.no_grad():
        for value in state.values():
            local(value).fill_(9.0)
    dcp.load(state, checkpoint_id=path)
    optimizer.after_load()
    losses = train(model, optimizer, case, range(SAVED_AFTER, STEPS), dp)
    return losses, gather(optimizer, "shard")


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("saved", "loaded", "dtype"),
    [
        ((4, 1), (2, 3), FP32),
        ((2, 3), (3, 0), FP32),
        ((3, 0), (4, 1, 2), FP32),
        ((4, 3), (1, 0), FP32),
        ((4, 3, 2), (4, 2), FP32),
        ((4, 2), (4, 3, 2), BF16),
        ((3, 2), (4, 3), BF16),
        ((2, 0), (3, 2), BF16),
    ],
    ids=str,
)
def test_any_layout_continues_any_other(
    saved: tuple[int, ...], loaded: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    """`saved` and `loaded` are (data-parallel ranks, stage, size of ZeRO's groups where it has any)."""
    (ranks, stage, *size), (now, other, *another) = saved, loaded
    losses, weights = run_ranks(ranks, quietly(save), case_of(stage, dtype, *size), ranks, tmp_path)[0]
    resumed, resumed_weights = run_ranks(now, quietly(resume), case_of(other, dtype, *another), now, tmp_path)[0]
    low = dtype == BF16  # other microbatches round otherwise
    assert resumed == pytest.approx(losses, rel=2**-8 if low else 1e-5)
    for name, weight in weights.items():
        assert (resumed_weights[name] - weight).abs().max() < (5e-3 if low else 5e-5), name


def quietly(function):
    """Without what DCP warns of inside torch."""

    def wrapped(*args):
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        return function(*args)

    return wrapped


def keys_and_aliases(case: Case, dp: int) -> tuple[list[str], bool]:
    """Names in the state, and whether writing to it writes to the live shards."""
    _, optimizer = sharded(case, dp)
    state = optimizer.state_dict()
    with torch.no_grad():
        local(state["model.blocks.0.up.weight"]).fill_(3.0)
    shard = next(trained.shard for trained in optimizer.trained if trained.spec.name == "blocks.0.up.weight")
    return sorted(state), bool((shard == 3.0).all())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_holds_one_fp32_copy_of_the_weights_and_shares_its_memory(stage: int) -> None:
    keys, aliases = run_ranks(2, keys_and_aliases, Case(stage=stage, optimizer="adamw", dtype=torch.bfloat16), 2)[0]
    names = [key.removeprefix("model.") for key in keys if key.startswith("model.")]
    moments = [f"optimizer.{state}.{name}" for state in ("exp_avg", "exp_avg_sq") for name in names]
    assert sorted([*(f"model.{name}" for name in names), *moments, "optimizer.step"]) == keys
    assert len(names) == 22 and aliases


FROZEN = "blocks.1.up.weight"


def save_initial(case: Case, path: Path) -> None:
    """Write a checkpoint of untrained weights."""
    _, optimizer = sharded(case, 2)
    dcp.save(optimizer.state_dict(), checkpoint_id=path)


def load_frozen(cases: list[Case], path: Path) -> list[tuple[torch.dtype, torch.Tensor]]:
    """`FROZEN`'s type in the state, and its value as a module reads it after a load and a step without a forward pass."""
    found, seen = [], []
    for case in cases:
        model, optimizer = sharded(case, 2)
        state = optimizer.state_dict()
        with torch.no_grad():
            local(state[f"model.{FROZEN}"]).fill_(9.0)
        dcp.load(state, checkpoint_id=path)
        optimizer.after_load()
        optimizer.step(0.0, case.clip)
        module = model.blocks[1].up
        module.register_forward_pre_hook(lambda module, _inputs: seen.append(module.weight.detach().clone()))
        with torch.no_grad():
            model(toy.batch(0)[:, :-1])
        found.append((state[f"model.{FROZEN}"].dtype, seen.pop()))
    return found


def test_frozen_weights_have_one_copy_in_the_training_type_and_load_from_any(tmp_path: Path) -> None:
    """A checkpoint has it, for the state holds no other; earlier versions kept frozen weights in fp32."""
    cases = [Case(stage=stage, dtype=dtype, frozen=(FROZEN,)) for dtype in (FP32, BF16) for stage in (0, 1, 2, 3)]
    for saved, dtype in ((Case(stage=1), FP32), (cases[-1], BF16)):
        path = tmp_path / str(dtype)
        run_ranks(2, quietly(save_initial), saved, path)
        expected = dict(toy.build(saved).named_parameters())[FROZEN].detach().to(dtype)
        for results in run_ranks(2, quietly(load_frozen), cases, path):
            for case, (kept, value) in zip(cases, results):
                assert kept == case.dtype and torch.equal(value, expected.to(case.dtype)), case
