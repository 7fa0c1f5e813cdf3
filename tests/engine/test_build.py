"""What cards say becomes units."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest

from neox_native.config.schema import Compile, Config, Model, Parallel, Run, Training
from neox_native.engine import build
from neox_native.errors import UserError
from neox_native.mesh import build_mesh
from neox_native.model.transformer import cards
from neox_native.parallel.assemble import assemble
from neox_native.zero.spec import Rule
from tests.parallel.layouts import CPU
from tests.ranks import run_ranks

MODEL = Model(num_layers=2, hidden_size=16, num_heads=2, seq_length=8, vocab_size=32)
EXPERTS = "layers.0.mlp."


def described(model: Model) -> dict:
    """Cards by which one feed-forward layer is an expert that learns twice as fast."""
    found = dict(cards(model))
    for name in found:
        if name.startswith(EXPERTS):
            found[name] = replace(found[name], family="expert", lr_multiplier=2.0)
    return found


def units() -> dict[str, dict[str, Rule]]:
    """The rule of each parameter, by its unit."""
    parallel = Parallel(dp=1)
    mesh = build_mesh(parallel, CPU)
    parts = assemble(MODEL, parallel, Training(), Compile(), mesh)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(build, "cards", described)
        return {
            unit.name: {spec.name: spec.rule for spec in unit.specs}
            for unit in build.units_of(parts, MODEL, parallel, mesh)[0]
        }


def test_an_elastic_run_is_refused_where_torch_rounds_a_sum_over_tp(monkeypatch):
    parallel = Parallel(pp=2, dp=1, tp=2, virtual_stages=2, pipeline_schedule="zbv")
    config = Config(run=Run(determinism="elastic"), model=MODEL, parallel=parallel)
    for version, refused in ("2.11.0", True), ("2.13.0+cpu", False):
        monkeypatch.setattr(build.torch, "__version__", version)
        with pytest.raises(UserError, match="take torch 2.13 or another schedule") if refused else nullcontext():
            build.require_possible(config)


def test_a_unit_is_a_place_in_the_model_and_a_family_of_parameters():
    found = run_ranks(1, units)[0]
    assert list(found) == ["embedding", "layers.0", "layers.0.experts", "layers.1", "head"]
    assert all(name.startswith(EXPERTS) for name in found["layers.0.experts"]) and len(found["layers.0.experts"]) == 4
    assert set(found["layers.0.experts"].values()) == {Rule(True, 2.0), Rule(False, 2.0)}
    assert found["layers.1"]["layers.1.mlp.dense_h_to_4h.weight"] == Rule(True) and len(found["layers.1"]) == 12


def ends_joined(tied: bool) -> list[list[int]]:
    """Places in the pipeline that get groups of their own."""
    parallel, model = Parallel(pp=2, dp=1), replace(MODEL, tie_embeddings=tied)
    mesh, asked = build_mesh(parallel, CPU), []
    parts = assemble(model, parallel, Training(), Compile(), mesh)
    mesh.across_stages = asked.append
    build.units_of(parts, model, parallel, mesh)
    return asked


def test_ends_of_a_pipeline_have_a_group_only_where_they_are_tied():
    assert run_ranks(2, lambda: [ends_joined(tied) for tied in (True, False)])[1] == [[[0, 1]], []]
