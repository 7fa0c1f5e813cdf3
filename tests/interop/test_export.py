"""Training writes Hugging Face folders from any layout, of the same weights as its checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train as entry
from neox_native.config.check import require
from neox_native.interop.checkpoints import CheckpointReader
from neox_native.interop.hugging_face import HuggingFaceReader, export_state
from neox_native.train import keeping
from tests.interop.models import assert_equal, weights
from tests.ranks import RankError, run_ranks
from tests.train.test_run import corpus, run, settings

__all__ = ["corpus"]
EXPORT = ["--training.steps=3", "--checkpoint.export_hf_every=2", "--checkpoint.save_every=1", "--data.tokenizer="]
LAYOUTS = {
    "one process": ["--parallel.dp=1"],
    "pp 2, tp 2, tied": ["--parallel.pp=2", "--parallel.tp=2", "--parallel.dp=1", "--model.tie_embeddings=true"],
    "dp 2, tp 2, ZeRO-3": ["--parallel.dp=2", "--parallel.tp=2", "--parallel.zero_stage=3"],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_an_export_holds_the_weights_of_its_step(corpus, tmp_path, layout):
    run(settings(corpus, tmp_path, *EXPORT, *layout))
    exports = sorted((tmp_path / "hugging_face").iterdir())
    assert [path.name for path in exports] == ["step_000000002", "step_000000003"]
    for path in exports:
        found, saved = HuggingFaceReader(path), CheckpointReader(tmp_path / "checkpoints" / path.name)
        assert found.model == saved.model
        assert_equal(weights(found, found.model), weights(saved, saved.model))


def test_what_a_kill_between_save_and_export_left_out_is_exported_by_the_restart(corpus, tmp_path):
    config = settings(corpus, tmp_path, *EXPORT, "--parallel.dp=1", "--checkpoint.export=bf16")
    folders = [tmp_path / "hugging_face" / f"step_{step:09d}" for step in (2, 3)]

    def train_until(killed: Path) -> None:
        def kill(folder, *_):
            assert folder != killed, "killed here"
            return export_state(folder, *_)

        keeping.export_state = kill
        entry.train(require(config, 1), torch.device("cpu"))

    for killed in folders:  # the second start writes what the first did not come to, and trains on
        with pytest.raises(RankError, match="killed here"):
            run_ranks(1, train_until, killed)
        assert not killed.exists() and (tmp_path / "checkpoints" / killed.name).is_dir()
    run(config)  # it has taken its last step, and exports
    for folder in folders:
        found, saved = HuggingFaceReader(folder), CheckpointReader(tmp_path / "checkpoints" / folder.name)
        assert_equal(weights(found, found.model), weights(saved, saved.model))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*") if path.parent.name in ("hugging_face", "weights")}
    assert {path.parent.name for path in before} == {"hugging_face", "weights"}
    run(config)  # what is there is not written again
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_exports_of_an_abandoned_branch_are_set_aside(corpus, tmp_path):
    config = [*EXPORT, "--parallel.dp=1", "--checkpoint.export=fp32"]
    run(settings(corpus, tmp_path, *config))
    for start, aside in (f"{tmp_path}/checkpoints/step_000000002", {"checkpoints", "hugging_face", "weights"}), ("none", None):
        run(settings(corpus, tmp_path, *config, f"--checkpoint.resume={start}"))
        assert [path.name for path in sorted((tmp_path / "hugging_face").iterdir())] == ["step_000000002", "step_000000003"]
        if aside:
            assert {path.name for path in (tmp_path / "before-1").iterdir()} == aside
            assert [path.name for path in (tmp_path / "before-1" / "hugging_face").iterdir()] == ["step_000000003"]
    assert {"hugging_face", "weights"} <= {path.name for path in (tmp_path / "before-2").iterdir()}


def test_a_run_that_cannot_be_exported_is_refused_before_its_first_step(corpus, tmp_path):
    with pytest.raises(Exception, match="cannot express model.norm = 'rmsnorm'"):
        run(settings(corpus, tmp_path, *EXPORT, "--parallel.dp=1", "--model.norm=rmsnorm"))
    assert not (tmp_path / "checkpoints").exists()
