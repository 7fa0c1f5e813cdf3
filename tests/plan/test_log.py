"""Training's own log says what was predicted, beside what it measures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from neox_native.config.check import require
from neox_native.errors import UserError
from neox_native.model.kinds import KINDS
from neox_native.parallel.timeline import timeline
from neox_native.plan import costs
from neox_native.plan.dry_run import distinct_ranks
from neox_native.plan.hardware import find_gpu
from neox_native.plan.search import search
from neox_native.plan.speed import Machine
from neox_native.units import share_of_step
from tests.checkpoint.small_runs import events, run, settings, write_corpus


def test_a_run_begins_with_what_it_will_need_and_send(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes = ["--training.steps=2", "--parallel.pp=2", "--parallel.dp=1", "--parallel.tp=1"]
    config = require(settings(write_corpus(tmp_path), tmp_path / "run", *changes), 2)
    run(config)
    (event,) = events(tmp_path / "run", "prediction")
    predicted = costs.predict(config)
    assert event.items() >= dataclasses.asdict(predicted).items() and predicted.sentence(with_memory=False) in event["message"]
    assert predicted.bubble_fraction == pytest.approx(timeline("1f1b", 2, 1, 8).bubble_fraction)
    assert "enabled = false" in (tmp_path / "run" / "config.toml").read_text() and config.compile.enabled == "auto"  # on a CPU
    said = capfd.readouterr().out
    assert " parameters in fp32, eager, on " in said
    line = next(line for line in said.splitlines() if line.startswith("step 2/2"))
    assert "  bubble " in line and f"predicted bubble {share_of_step(predicted.bubble_fraction):.4g}" in line


def test_a_prediction_is_of_the_busiest_rank() -> None:
    config = require(settings("corpus", Path("run"), "--parallel.pp=2", "--parallel.dp=2", "--parallel.tp=1"), 4)
    predicted = costs.predict(config)
    assert predicted.bytes_by_axis == {
        axis: max(costs.traffic(config, rank)[axis] for rank in range(2)) for axis in ("pp", "dp", "tp", "world")
    }
    said = predicted.sentence(with_memory=True)
    assert "iB of memory and sends dp " in said and "tp" not in said


def test_a_kind_without_costs_trains_unpredicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = dataclasses.replace(KINDS["feed_forward"], name="silent", module="silent", norm="silent_norm", costs=None)
    monkeypatch.setitem(KINDS, silent.name, silent)
    changes = ['--model.pattern=["attention+feed_forward", "silent"]', "--training.steps=2", "--parallel.pp=1"]
    config = require(settings(write_corpus(tmp_path), tmp_path / "run", *changes, "--parallel.dp=2", "--parallel.tp=1"), 2)
    run(config)
    (event,) = events(tmp_path / "run", "prediction")
    assert event["peak_bytes"] is None and event["bytes_by_axis"] == costs.predict(config).bytes_by_axis
    assert event["message"].endswith("; memory is not predicted, for a layer kind of model.pattern does not state its costs")
    assert distinct_ranks(config, 2) == [0] and costs.model_flops_of_rank(config, 0) > 0
    with pytest.raises(UserError, match="layer kind 'silent', which does not state its costs"):
        search(config, 2, Machine(find_gpu("H100")))
