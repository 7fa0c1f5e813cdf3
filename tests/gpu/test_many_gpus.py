"""Every axis on two GPUs or more, over NCCL, against one process on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from neox_native.config.schema import Parallel, Run
from neox_native.launch import Launch, pick_device
from neox_native.mesh import build_mesh
from tests.ranks import run_ranks
from tests.train.runs import compare, config_of
from tests.train.test_layouts import SCHEDULES, layout

EXACT = Run(device="cuda", determinism="bitwise")
MESHES = [(1, 2, 1), (1, 1, 2), (2, 1, 1), (1, 4, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1), (2, 2, 2)]


def on(parallel: Parallel, *values: object) -> object:
    """A case, for as many GPUs as its layout has ranks."""
    return pytest.param(parallel, *values, marks=pytest.mark.gpu(parallel.pp * parallel.dp * parallel.tp), id=str(parallel))


@pytest.mark.parametrize("parallel", [on(layout(*mesh, sequence_parallel=sequence)) for mesh in MESHES for sequence in (False, True)])
def test_every_axis_draws_the_curve_of_a_cpu(parallel: Parallel) -> None:
    compare(parallel, "tied", run=EXACT, relative=1e-4)


@pytest.mark.parametrize("parallel", [on(layout(1, 2, 1)), on(layout(1, 2, 2))])
def test_groups_inherit_streams_of_high_priority(parallel: Parallel) -> None:
    def high_priority() -> bool:
        device = pick_device("cuda", Launch.from_environment())
        backend = build_mesh(parallel, device).shards().group._get_backend(device)
        return backend.options.is_high_priority_stream

    ranks = parallel.dp * parallel.tp
    assert run_ranks(ranks, high_priority, device="cuda") == [True] * ranks


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("parallel", [on(layout(1, ranks, 1, zero_stage=stage)) for ranks in (2, 4) for stage in range(4)])
def test_every_stage_of_zero_draws_the_curve_of_a_cpu(parallel: Parallel, recompute: str) -> None:
    compare(parallel, run=EXACT, relative=1e-4, activation_checkpointing=recompute)


@pytest.mark.parametrize("parallel", [on(replace(layout(1, 4, 1, zero_stage=stage), zero_shard_size=2)) for stage in (1, 2, 3)])
def test_shards_inside_groups_draw_the_curve_of_a_cpu(parallel: Parallel) -> None:
    compare(parallel, run=EXACT, relative=1e-4)


@pytest.mark.parametrize("parallel", [on(layout(2, 1, 1, schedule)) for schedule in SCHEDULES])
def test_every_schedule_draws_the_curve_of_a_cpu(parallel: Parallel) -> None:
    compare(parallel, "tied", run=EXACT, relative=1e-4)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("parallel", [on(layout(1, 1, 2)), on(layout(2, 1, 1)), on(layout(1, 2, 1, zero_stage=3))])
def test_compiled_layouts_are_one_eager_gpu_to_rounding(parallel: Parallel, sequence_parallel: bool) -> None:
    run = Run(device="cuda")
    parallel = replace(parallel, sequence_parallel=sequence_parallel)
    compare(parallel, compiled=True, twin=config_of(parallel, run=run), run=run, relative=1e-2)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    "parallel", [on(replace(layout(*mesh, sequence_parallel=True), async_tp=True)) for mesh in [(1, 1, 2), (1, 1, 4), (2, 1, 2)]]
)
def test_tensor_parallelism_in_pieces_is_the_plain_one_to_rounding(parallel: Parallel, recompute: str) -> None:
    run = Run(device="cuda")
    twin = config_of(replace(parallel, async_tp=False), run=run)
    compare(parallel, compiled=True, twin=twin, run=run, relative=1e-2, activation_checkpointing=recompute)
