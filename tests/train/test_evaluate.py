"""Evaluation weighs targets, not batches; and steps or evaluations without a target say so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from neox_native.config.schema import Config, Parallel
from neox_native.data.indexed import IndexedWriter
from neox_native.data.loader import StepBatch
from neox_native.engine.build import build_engine, build_model
from neox_native.engine.step import Losses
from neox_native.mesh import build_mesh
from neox_native.train.evaluate import evaluate
from tests.checkpoint.small_runs import curve, events, run, settings, write_corpus
from tests.ranks import run_ranks
from tests.train.runs import CPU, batch, config_of


def masked(whole: StepBatch) -> StepBatch:
    """The batch without its targets."""
    nothing = torch.full_like(whole.model_fields["targets_BT"], -100)
    return replace(whole, model_fields=whole.model_fields | {"targets_BT": nothing}, num_targets=0)


def evaluations(config: Config) -> list[float | None]:
    """The loss of a ragged batch, of a full one, of one without targets, and of all three together."""
    mesh = build_mesh(config.parallel, CPU)
    parts, optimizer = build_model(config, mesh, CPU)
    engine, losses, dp_rank = build_engine(config, mesh, CPU, parts, optimizer), Losses(mesh, CPU), mesh.rows.rank
    ragged, full = batch(config, 0, dp_rank, masked=True), batch(config, 1, dp_rank, masked=False)
    empty = masked(batch(config, 2, dp_rank, masked=False))
    found = []
    for batches in [ragged], [full], [empty], [ragged, empty, full]:
        found.append(evaluate(engine, losses, batches))
    return found


@pytest.mark.parametrize("parallel", [Parallel(dp=1), Parallel(pp=2, dp=2)], ids=["one process", "pp 2 x dp 2"])
def test_every_target_weighs_the_same_whichever_batch_holds_it(parallel: Parallel) -> None:
    outcomes = run_ranks(parallel.pp * parallel.dp, evaluations, config_of(parallel))
    ragged, full, empty, together = outcomes[0]
    assert outcomes == [outcomes[0]] * len(outcomes)
    assert empty is None and together == pytest.approx((72 * ragged + 128 * full) / 200, rel=1e-6)


def test_step_and_evaluation_without_a_target_say_so(tmp_path: Path) -> None:
    """Every label is masked, in training and in validation."""
    for name, dtype, labels in ("text", np.uint16, None), ("text_labels", np.int32, -100):
        with IndexedWriter(str(tmp_path / name), dtype) as writer:
            for number in range(40):
                tokens = np.arange(100) % 60
                writer.add_document(tokens if labels is None else np.full_like(tokens, labels))
    data = f'--data.train=[{{path = "{tmp_path / "text"}", weight = 1.0, labels = "{tmp_path / "text_labels"}"}}]'
    own = ["--parallel.dp=2", "--training.steps=3", "--logging.every=2", "--evaluation.every=3", "--evaluation.batches=2"]
    run(settings("", tmp_path / "run", data, "--data.split=80,20,0", *own))
    assert [event["step"] for event in events(tmp_path / "run", "empty step")] == [1, 2, 3]
    assert [line[1] for line in curve(tmp_path / "run")] == [None, None]
    (event,) = events(tmp_path / "run", "evaluation")
    assert event["loss"] is None and "no validation loss" in event["message"]


@pytest.mark.parametrize("rotate", [False, True])
def test_evaluations_of_equal_weights_compare_unless_they_rotate(tmp_path: Path, rotate: bool) -> None:
    own = ["--parallel.dp=1", "--parallel.tp=1", "--parallel.pp=1", "--training.steps=4", "--optimizer.lr=0.0", "--data.split=60,40,0"]
    every = ["--evaluation.every=2", "--evaluation.batches=1", f"--evaluation.rotate={str(rotate).lower()}"]
    run(settings(write_corpus(tmp_path), tmp_path / "run", *own, *every))
    first, second = (event["loss"] for event in events(tmp_path / "run", "evaluation"))
    assert (first == second) != rotate
