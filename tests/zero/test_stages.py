"""Every stage trains like one process in plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from neox_native.zero import collectives
from tests.ranks import run_ranks
from tests.zero.toy import Case, Run, run_serial, run_sharded

STAGES = (0, 1, 2, 3)
FROZEN_BLOCK = tuple(
    f"blocks.2.{name}" for name in ("norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias")
)
CASES = {
    "sgd": Case(),
    "adamw": Case(optimizer="adamw"),
    "accumulation": Case(accumulation=1),
    "no clipping": Case(clip=0.0),
    "not fused": Case(optimizer="rmsprop"),
    "learning rates": Case(multipliers=(("embed.weight", 0.5), ("blocks.1.up.bias", 3.0), ("head.weight", 3.0))),
    "loss scale": Case(scale=64.0),
    "recomputation": Case(recompute=True),
    "compiled": Case(compiled=True, steps=2),
    "compiled recomputation": Case(recompute=True, compiled=True, steps=2),
    "tied": Case(tied=True),
    "tied recomputation": Case(tied=True, recompute=True),
    "unused": Case(unused=True),
    "frozen": Case(frozen=("embed.weight", "blocks.1.up.weight", *FROZEN_BLOCK)),
    "frozen before trained": Case(
        frozen=tuple(f"blocks.1.{name}" for name in ("norm.weight", "norm.bias", "up.weight", "up.bias"))
    ),
    "frozen tied": Case(tied=True, frozen=("embed.weight", "blocks.0.up.bias")),
}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def assert_equal(ours: Run, theirs: Run, weights_tolerance: float, with_losses: bool = True) -> None:
    if with_losses:
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-5)
    for step, (left, right) in enumerate(zip(ours.gradients, theirs.gradients, strict=True)):
        assert left.keys() == right.keys()
        for name in right:
            assert relative(left[name], right[name]) < 1e-5, (step, name)
    for name, weight in theirs.weights.items():
        assert (ours.weights[name] - weight).abs().max() < weights_tolerance, name


def train_all(cases: list[Case], dp: int) -> list[Run]:
    """Several runs in one set of ranks."""
    return [run_sharded(case, dp) for case in cases]


ON_FOUR_RANKS = ("sgd", "unused", "tied", "frozen", "compiled recomputation")
"""The cases that run on 4 ranks by default, the others on 2; the rest is slow."""


def covering() -> list:
    """Every case on 2 and on 4 ranks, one of them marked slow."""
    slow = {(name, 2 if name in ON_FOUR_RANKS else 4) for name in CASES}
    both = [(name, dp) for name in CASES for dp in (2, 4)]
    return [pytest.param(*pair, marks=pytest.mark.slow if pair in slow else ()) for pair in both]


@pytest.mark.parametrize(("name", "dp"), covering())
def test_every_stage_equals_one_process(name: str, dp: int) -> None:
    cases = [replace(CASES[name], stage=stage) for stage in STAGES]
    for ours in run_ranks(dp, train_all, cases, dp)[0]:
        assert_equal(ours, run_serial(CASES[name], dp), 1e-6 if CASES[name].optimizer == "sgd" else 5e-5)


def test_whole_rows_give_what_chunks_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gloo's own collectives on rows, which is the way of NCCL."""
    low = Case(optimizer="adamw", dtype=torch.bfloat16, frozen=("blocks.1.up.weight",), accumulation=1)
    cases = [replace(case, stage=stage) for case in (CASES["tied recomputation"], CASES["frozen"], low) for stage in (1, 2, 3)]
    in_chunks = run_ranks(2, train_all, cases, 2)[0]
    monkeypatch.setattr(collectives, "pairwise", lambda _group: False)
    in_rows = run_ranks(2, train_all, cases, 2)[0]
    for one, other in zip(in_chunks, in_rows):
        assert (one.losses, one.norms) == (other.losses, other.norms)
        assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())


def test_units_may_have_groups_of_their_own() -> None:
    """Norms tell that replicas are counted unit by unit."""
    case = Case(own_groups=True, recompute=True, unused=True)
    for ours in run_ranks(4, train_all, [replace(case, stage=stage) for stage in STAGES], 4)[1]:
        assert_equal(ours, run_serial(case, 4), 1e-6)


def test_shards_inside_groups_equal_one_process() -> None:
    tried = [("tied recomputation", 1), ("unused", 1), ("accumulation", 2), ("unused", 2), ("frozen", 3), ("tied recomputation", 3)]
    cases = {(name, stage): replace(CASES[name], stage=stage, shard_size=2) for name, stage in tried}
    for (name, _), ours in zip(cases, run_ranks(4, train_all, list(cases.values()), 4)[3]):
        assert_equal(ours, run_serial(CASES[name], 4), 1e-6 if CASES[name].optimizer == "sgd" else 5e-5)


def test_one_data_rank_has_nothing_to_shard() -> None:
    cases = [Case(stage=stage) for stage in STAGES]
    for ours in run_ranks(1, train_all, cases, 1)[0]:
        assert_equal(ours, run_serial(Case(), 1), 1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_ranks_may_differ_in_which_parameters_receive_gradients(stage: int) -> None:
    case = Case(stage=stage, skip_blocks=((0, 0), (1, 1)))
    (ours, _) = run_ranks(2, run_sharded, case, 2)
    assert_equal(ours, run_serial(case, 2), 1e-6, with_losses=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_low_precision_stages_agree(dtype: torch.dtype, optimizer: str) -> None:
    base = Case(dtype=dtype, optimizer=optimizer, scale=16.0 if dtype == torch.float16 else 1.0)
    replicated, *sharded = run_ranks(2, train_all, [replace(base, stage=stage) for stage in STAGES], 2)[0]
    for ours in sharded:
        assert_equal(ours, replicated, 1e-6 if optimizer == "sgd" else 5e-5)


def test_low_precision_agrees_inside_groups_and_integers_are_the_same_bits() -> None:
    rounded = [Case(dtype=torch.bfloat16, stage=stage, shard_size=2 if stage else 0, steps=2) for stage in (0, 1, 3)]
    exact = [replace(case, fixed=True, clip=0.0, steps=1) for case in rounded]
    replicated, *sharded = run_ranks(4, train_all, rounded + exact, 4)[1]
    for ours in sharded[:2]:
        assert_equal(ours, replicated, 1e-6)
    expected, *same = sharded[2:]
    for ours in same:
        assert ours.norms == expected.norms and ours.gradients[0].keys() == expected.gradients[0].keys()
        assert all(torch.equal(ours.gradients[0][name], gradient) for name, gradient in expected.gradients[0].items())


def test_low_precision_follows_fp32() -> None:
    """bf16 rounds weights, not the sums: the loss stays within bf16's 2^-8."""
    low, full = run_ranks(2, train_all, [Case(stage=2, dtype=torch.bfloat16), Case(stage=2)], 2)[0]
    assert low.losses == pytest.approx(full.losses, rel=2**-8)
