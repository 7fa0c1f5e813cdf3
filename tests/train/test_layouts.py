"""Three steps on every mesh against one process: losses, norms, evaluation, first gradients, last weights."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from neox_native.config.schema import Parallel
from tests.train.runs import compare, config_of

MESHES = [(1, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1), (2, 2, 2)]
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "looped_bfs": 2, "interleaved_zero_bubble": 2, "zbv": 2}


def layout(pp: int, dp: int, tp: int, schedule: str = "1f1b", sequence_parallel: bool = False, zero_stage: int = 0) -> Parallel:
    """A [parallel] section."""
    return Parallel(pp, dp, tp, sequence_parallel, schedule, SCHEDULES[schedule] if pp > 1 else 1, zero_stage=zero_stage)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_accumulation_does_not_change_the_numbers(micro_batch_size):
    compare(layout(1, 1, 1), micro_batch_size=micro_batch_size)


def test_settings_of_an_axis_of_degree_1_are_ignored():
    unused = Parallel(dp=1, sequence_parallel=True, pipeline_schedule="zbv", virtual_stages=2, stage_layers=[2, 2], zero_stage=3)
    compare(unused, "tied", micro_batch_size=8)


@pytest.mark.parametrize(
    "mesh, schedule, sequence_parallel, model",
    [
        ((1, 2, 1), "1f1b", False, "parallel"),
        ((1, 2, 2), "1f1b", True, "sequential"),
        ((2, 1, 2), "1f1b", False, "tied"),
        ((2, 2, 1), "interleaved_1f1b", False, "tied"),
        ((2, 2, 1), "zbv", False, "tied"),
        ((2, 2, 2), "interleaved_zero_bubble", True, "parallel"),
        ((2, 2, 2), "gpipe", False, "sequential"),
        ((2, 1, 1), "looped_bfs", False, "sequential"),
    ],
    ids=str,
)
def test_a_layout_does_not_change_the_numbers(mesh, schedule, sequence_parallel, model):
    compare(layout(*mesh, schedule, sequence_parallel), model)


@pytest.mark.parametrize("mesh", [(1, 2, 2), (2, 2, 1)], ids=str)
def test_a_layout_does_not_change_adamw(mesh):
    compare(layout(*mesh, sequence_parallel=True), optimizer="adamw")


@pytest.mark.parametrize("mesh", [(1, 2, 1), (1, 1, 2), (2, 2, 1)], ids=str)
def test_masked_targets_weigh_the_same_in_every_layout(mesh):
    compare(layout(*mesh), masked=True, micro_batch_size=2 if mesh[0] == 1 else 1)


UNEVEN = [
    ((1, 2, 4), True, 1, "grouped odd tied"),
    ((2, 1, 2), False, 0, "one key head"),
    ((1, 2, 2), False, 3, "odd tied"),
]
UNEVEN_SLOW = [
    (mesh, sequence_parallel, stage, model)
    for mesh in ((1, 1, 2), (1, 2, 4), (2, 2, 2), (2, 1, 4))
    for sequence_parallel, stage in ((False, 0), (True, 1), (True, 2), (False, 3))
    for model in ("grouped odd tied", "one key head", "odd")
]


@pytest.mark.parametrize("mesh, sequence_parallel, stage, model", UNEVEN, ids=str)
def test_a_vocabulary_or_heads_that_tp_does_not_divide(mesh, sequence_parallel, stage, model):
    compare(layout(*mesh, sequence_parallel=sequence_parallel, zero_stage=stage), model)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, sequence_parallel, stage, model", UNEVEN_SLOW, ids=str)
def test_every_stage_of_a_vocabulary_or_heads_that_tp_does_not_divide(mesh, sequence_parallel, stage, model):
    compare(layout(*mesh, sequence_parallel=sequence_parallel, zero_stage=stage), model)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("mesh, stage", [((1, 2, 1), 1), ((1, 2, 2), 2), ((1, 4, 1), 3), ((2, 2, 1), 1), ((2, 2, 2), 3)], ids=str)
def test_zero_does_not_change_the_numbers(mesh, stage, recompute):
    compare(layout(*mesh, sequence_parallel=True, zero_stage=stage), micro_batch_size=1, activation_checkpointing=recompute)


IN_PAIRS = [
    pytest.param((1, 4, 1), 1, 2, "parallel", marks=pytest.mark.slow),
    pytest.param((1, 4, 1), 3, 1, "odd tied", marks=pytest.mark.slow),
    ((1, 4, 2), 2, 1, "one key head"),
    ((2, 4, 1), 3, 1, "tied"),
]


@pytest.mark.parametrize("mesh, stage, size, model", IN_PAIRS, ids=str)
def test_shards_inside_groups_do_not_change_the_numbers(mesh, stage, size, model):
    parallel = layout(*mesh, sequence_parallel=True, zero_stage=stage)
    compare(replace(parallel, zero_shard_size=2), model, micro_batch_size=size)


@pytest.mark.slow
@pytest.mark.parametrize("precision, optimizer", [("fp32", "sgd"), ("fp32", "adamw"), ("bf16", "sgd")])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("mesh", [(1, 4, 1), (1, 4, 2), (2, 4, 1)], ids=str)
def test_every_stage_inside_groups_draws_the_serial_curve(mesh, stage, size, precision, optimizer):
    """bf16 against stage 0 of the same mesh."""
    settings = dict(micro_batch_size=size, precision=precision)
    same_mesh = layout(*mesh, "1f1b" if size == 1 else "gpipe", sequence_parallel=True)
    twin = config_of(same_mesh, optimizer=optimizer, **settings) if precision == "bf16" else None
    compare(replace(same_mesh, zero_stage=stage, zero_shard_size=2), optimizer=optimizer, twin=twin, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_groups_work_under_every_schedule(schedule):
    stage = 1 if schedule in ("interleaved_zero_bubble", "zbv") else 3
    compare(replace(layout(2, 4, 1, schedule, zero_stage=stage), zero_shard_size=2), "tied")


@pytest.mark.parametrize(
    "mesh, stage", [((1, 1, 2), 0), pytest.param((2, 2, 1), 1, marks=pytest.mark.slow), ((1, 2, 1), 3)], ids=str
)
def test_compiled_blocks_do_not_change_the_numbers(mesh, stage):
    compare(layout(*mesh, sequence_parallel=True, zero_stage=stage), compiled=True)


def every_layout():
    """Meshes x schedules x residuals x sequence parallelism x accumulation splits, without what cannot differ."""
    for mesh, residual, sequence_parallel, size in itertools.product(MESHES, ("parallel", "sequential"), (False, True), (1, 2)):
        pp, dp, tp = mesh
        for schedule in SCHEDULES if pp > 1 else ("1f1b",):
            microbatches = 8 // (dp * size)
            if (tp > 1 or not sequence_parallel) and microbatches >= (2 if pp > 1 else 1):
                yield pytest.param(layout(*mesh, schedule, sequence_parallel), residual, size)


@pytest.mark.slow
@pytest.mark.parametrize("parallel, model, size", list(every_layout()))
def test_every_layout_draws_the_serial_curve(parallel, model, size):
    compare(parallel, model, micro_batch_size=size)


ZERO_MESHES = [(1, 2, 1), (1, 4, 1), (1, 2, 2), (2, 2, 1), (2, 2, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("mesh", ZERO_MESHES, ids=str)
def test_every_zero_stage_draws_the_serial_curve(mesh, stage, optimizer, recompute):
    parallel = layout(*mesh, sequence_parallel=True, zero_stage=stage)
    compare(parallel, optimizer=optimizer, activation_checkpointing=recompute)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("mesh", ZERO_MESHES, ids=str)
def test_every_zero_stage_of_compiled_blocks_draws_the_serial_curve(mesh, stage, recompute):
    compare(layout(*mesh, sequence_parallel=True, zero_stage=stage), activation_checkpointing=recompute, compiled=True)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name not in ("interleaved_zero_bubble", "zbv")])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_2_and_3_work_under_every_schedule_that_takes_them(schedule, stage):
    compare(layout(2, 2, 1, schedule, zero_stage=stage), "tied")


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("mesh", ZERO_MESHES, ids=str)
def test_in_bf16_every_zero_stage_agrees_with_stage_0(mesh, stage, recompute):
    settings = dict(precision="bf16", activation_checkpointing=recompute)
    same_mesh = layout(*mesh, sequence_parallel=True)
    compare(replace(same_mesh, zero_stage=stage), twin=config_of(same_mesh, **settings), **settings)
