"""Closed forms against the dry run, which counts what the code does: volumes equal, memory within 5%."""

from __future__ import annotations

import pytest

from neox_native.config.check import require
from neox_native.config.load import load
from neox_native.config.schema import Parallel
from neox_native.parallel.timeline import timeline
from neox_native.plan import costs
from neox_native.plan.memory import in_flight, memory
from neox_native.plan.shares import elements_of
from neox_native.train.dryrun import dry_run

NO_RECOMPUTATION = "--training.activation_checkpointing none"
LOOPED = "--parallel.virtual_stages 2 --parallel.pipeline_schedule"
# Config, ranks, rank, overrides.
FEW = [
    ("70m", 4, 0, "--training.micro_batch_size 4 --training.global_batch_size 48 --parallel.zero_stage 3"),
    ("70m", 4, 0, "--training.micro_batch_size 4 --training.global_batch_size 24 --parallel.tp 2 --parallel.sequence_parallel true"),
    ("70m", 4, 2, "--training.micro_batch_size 4 --training.global_batch_size 32 --parallel.pp 2 --model.tie_embeddings true"),
]
MANY = [
    ("160m", 1, 0, f"--training.micro_batch_size 4 --training.global_batch_size 12 {NO_RECOMPUTATION}"),
    ("160m", 2, 0, "--training.micro_batch_size 4 --training.global_batch_size 24 --parallel.zero_stage 0"),
    ("160m", 4, 0, f"--training.micro_batch_size 4 --training.global_batch_size 48 --model.parallel_residual false {NO_RECOMPUTATION}"),
    ("160m", 4, 0, "--training.micro_batch_size 8 --training.global_batch_size 96 --parallel.zero_stage 2"),
    ("160m", 4, 0, "--training.micro_batch_size 8 --training.global_batch_size 48 --parallel.tp 2 --model.parallel_residual false"),
    (
        "160m",
        4,
        0,
        "--training.micro_batch_size 8 --training.global_batch_size 48 --parallel.tp 2 --parallel.sequence_parallel true "
        f"--model.pos_emb learned {NO_RECOMPUTATION}",
    ),
    (
        "160m",
        4,
        0,
        "--training.micro_batch_size 8 --training.global_batch_size 48 --parallel.tp 2 --parallel.sequence_parallel true "
        "--model.parallel_residual false",
    ),
    (
        "160m",
        4,
        0,
        "--training.micro_batch_size 8 --training.global_batch_size 128 --parallel.pp 4 --parallel.virtual_stages 3 "
        f"--parallel.pipeline_schedule interleaved_1f1b {NO_RECOMPUTATION}",
    ),
    ("160m", 4, 0, f"--training.micro_batch_size 8 --training.global_batch_size 128 --parallel.pp 4 {LOOPED} zbv {NO_RECOMPUTATION}"),
    (
        "160m",
        4,
        0,
        f"--training.micro_batch_size 8 --training.global_batch_size 128 --parallel.pp 4 {LOOPED} interleaved_zero_bubble {NO_RECOMPUTATION}",
    ),
    (
        "160m",
        4,
        1,
        "--training.micro_batch_size 8 --training.global_batch_size 64 --parallel.pp 4 --parallel.pipeline_schedule gpipe "
        + NO_RECOMPUTATION,
    ),
    ("1b", 8, 0, "--training.micro_batch_size 1 --training.global_batch_size 32 --parallel.zero_stage 3 --training.precision fp32"),
    (
        "1b",
        8,
        0,
        "--training.micro_batch_size 4 --training.global_batch_size 8 --parallel.tp 8 --parallel.sequence_parallel true "
        f"--model.norm rmsnorm --model.activation swiglu {NO_RECOMPUTATION}",
    ),
    (
        "1b",
        8,
        0,
        f"--training.micro_batch_size 2 --training.global_batch_size 32 --parallel.tp 2 --parallel.pp 4 {LOOPED} looped_bfs "
        "--model.pos_emb none --training.precision fp32",
    ),
    ("1b", 8, 2, f"--training.micro_batch_size 1 --training.global_batch_size 32 --parallel.pp 4 --parallel.zero_stage 3 {NO_RECOMPUTATION}"),
]


def hold(name: str, ranks: int, rank: int, overrides: str) -> None:
    """Assert that the closed forms of a layout are what the dry run counts."""
    config = require(load(f"configs/pythia/{name}.toml", overrides.split()), ranks)
    report = dry_run(config, rank, ranks)
    stage = report.coordinates["pp"]
    assert elements_of(config, stage).parameters == report.parameters
    assert costs.traffic(config, stage) == {axis: sent["bytes"] for axis, sent in report.communication.items()}
    assert costs.point_to_point_bytes(config, stage) == report.point_to_point_bytes
    predicted = memory(config, stage)
    assert abs(sum(predicted.values()) / report.peak_bytes - 1) < 0.05, (predicted, report.bytes_by_kind)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_closed_forms_are_what_the_code_does(case: tuple[str, int, int, str]) -> None:
    hold(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_closed_forms_are_what_the_code_does_on_a_wide_grid(case: tuple[str, int, int, str]) -> None:
    hold(*case)


@pytest.mark.parametrize("schedule, virtual", [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 3), ("looped_bfs", 2)])
@pytest.mark.parametrize("pp, microbatches", [(2, 8), (4, 8), (4, 16)])
def test_bubble_and_microbatches_in_flight_are_those_of_the_schedule(schedule: str, virtual: int, pp: int, microbatches: int) -> None:
    parallel = Parallel(pp=pp, dp=1, pipeline_schedule=schedule, virtual_stages=virtual)
    drawn = timeline(schedule, pp, virtual, microbatches)
    assert costs.bubble_fraction(parallel, microbatches) == pytest.approx(drawn.bubble_fraction)
    assert [in_flight(parallel, microbatches, rank) for rank in range(pp)] == [drawn.peak_in_flight(rank) for rank in range(pp)]


@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv"])
def test_split_backward_passes_leave_a_third_of_the_bubble(schedule: str) -> None:
    parallel = Parallel(pp=4, dp=1, pipeline_schedule=schedule, virtual_stages=2)
    drawn = timeline(schedule, 4, 2, 16)
    assert costs.bubble_fraction(parallel, 16) == pytest.approx(drawn.bubble_fraction)
    assert in_flight(parallel, 16, 0) == drawn.peak_in_flight(0)


def test_flops_are_those_of_the_model_without_recomputation() -> None:
    config = require(load("configs/pythia/70m.toml", ["--training.global_batch_size", "64", "--training.micro_batch_size", "4"]), 1)
    parts = [costs.model_flops_of_rank(require(load("configs/20b.toml"), 64), stage) for stage in range(4)]
    tokens = 64 * config.model.seq_length
    from neox_native.model.flops import model_flops_per_token

    assert costs.model_flops_of_rank(config, 0) == tokens * model_flops_per_token(config.model)
    whole = load("configs/20b.toml")
    assert sum(parts) * 8 * 2 == pytest.approx(1536 * 2048 * model_flops_per_token(whole.model), rel=1e-6)
