"""One step on every mesh against one process: losses, and the gradient of every parameter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from neox_native.config.schema import Parallel
from tests.parallel.layouts import MODEL, on_mesh, serial
from tests.ranks import run_ranks

MODELS = {
    "parallel": MODEL,
    "sequential": replace(MODEL, parallel_residual=False),
    "gated grouped rmsnorm": replace(MODEL, activation="swiglu", num_kv_heads=2, norm="rmsnorm", attention_bias=False),
    "learned": replace(MODEL, pos_emb="learned"),
    "sinusoidal": replace(MODEL, pos_emb="sinusoidal"),
    "alibi": replace(MODEL, pos_emb="alibi"),
    "tied": replace(MODEL, tie_embeddings=True),
}


def check(model, parallel, microbatches=4, **options):
    loss, gradients = serial(model, microbatches, 2)
    results = run_ranks(parallel.pp * parallel.tp, on_mesh, model, parallel, microbatches, 2, options.pop("compiled", False), options.pop("recompute", "none"))
    found: dict[str, torch.Tensor] = {}
    for rank, (total, mine, evaluated) in enumerate(results):
        assert total == pytest.approx(loss, rel=1e-5) and evaluated == pytest.approx(loss, rel=1e-5)
        if rank % parallel.tp == 0:
            for name, gradient in mine.items():
                found[name] = found[name] + gradient if name in found else gradient  # tied ends hold a share each
    assert sorted(found) == sorted(gradients)
    for name, expected in gradients.items():
        error = (found[name] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole sequence", "sequence parallel"])
@pytest.mark.parametrize("name", MODELS)
def test_tensor_parallel_equals_serial(name, sequence_parallel):
    check(MODELS[name], Parallel(tp=2, dp=1, sequence_parallel=sequence_parallel))


@pytest.mark.parametrize(
    "schedule, virtual_stages",
    [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("looped_bfs", 2), ("interleaved_zero_bubble", 2), ("zbv", 2)],
)
@pytest.mark.parametrize("name", ["parallel", "tied"])
def test_pipeline_equals_serial(name, schedule, virtual_stages):
    check(MODELS[name], Parallel(pp=2, dp=1, pipeline_schedule=schedule, virtual_stages=virtual_stages))


@pytest.mark.parametrize(
    "recompute, schedule, virtual_stages",
    [("none", "1f1b", 1), ("full", "1f1b", 1), ("selective", "1f1b", 1), ("full", "interleaved_zero_bubble", 2), ("selective", "zbv", 2)],
)
def test_pipeline_of_tensor_parallel_stages_equals_serial(recompute, schedule, virtual_stages):
    parallel = Parallel(2, 1, 2, sequence_parallel=True, pipeline_schedule=schedule, virtual_stages=virtual_stages)
    check(MODELS["parallel"], parallel, recompute=recompute)
