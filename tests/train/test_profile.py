"""A profile of some steps: a trace and a table of each rank, and the run is as it was."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from neox_native.engine.step import TrainStep
from neox_native.metrics import profile
from tests.checkpoint.small_runs import curve, events, run, settings, write_corpus

SMALL = ["--model.num_layers=2", "--training.global_batch_size=4", "--checkpoint.save_every=0"]


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "profile").iterdir())


def test_each_rank_writes_a_trace_and_a_table_of_these_steps_and_no_number_changes(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    layout = [*SMALL, "--parallel.dp=2", "--parallel.zero_stage=2", "--training.steps=5"]
    run(settings(corpus, tmp_path / "plain", *layout))
    run(settings(corpus, tmp_path / "run", *layout, "--run.profile=3:5"))
    assert curve(tmp_path / "run") == curve(tmp_path / "plain")
    assert not (tmp_path / "plain/profile").exists()
    stems = [f"steps_3-4_rank_{rank}" for rank in range(2)]
    assert names_of(tmp_path / "run") == sorted(f"{stem}.{end}" for stem in stems for end in ("pt.trace.json.gz", "txt"))
    for stem in stems:
        found = json.loads(gzip.decompress((tmp_path / f"run/profile/{stem}.pt.trace.json.gz").read_bytes()))["traceEvents"]
        steps = {each["name"] for each in found if each["name"].startswith("ProfilerStep")}
        assert steps == {"ProfilerStep#3", "ProfilerStep#4"}
        assert any(each["name"].startswith("aten::") and each["ph"] == "X" for each in found)
        table = (tmp_path / f"run/profile/{stem}.txt").read_text()
        assert "Self CPU" in table and "aten::mm" in table
    (event,) = events(tmp_path / "run", "profile")
    assert event["step"] == 4
    assert event["message"].startswith(f"step 4: profiled steps 3 to 4: {tmp_path}/run/profile; the dearest: ")
    assert event["message"].count("%") == 3


def test_a_resumed_run_profiles_what_is_left_of_them_and_ends_with_the_run(tmp_path: Path) -> None:
    def die_at_5() -> None:
        step = TrainStep.__call__

        def dying(self, batch, rate):
            assert batch.consumed_samples < 5 * 4, "killed here"
            return step(self, batch, rate)

        TrainStep.__call__ = dying

    config = [*SMALL, "--parallel.dp=1", "--training.steps=6", "--checkpoint.save_steps=[4]", "--run.profile=4:100"]
    asked = settings(write_corpus(tmp_path), tmp_path / "run", *config)
    with pytest.raises(AssertionError, match="killed here"):
        run(asked, before=die_at_5)
    assert not (tmp_path / "run/profile").exists()
    run(asked)
    assert names_of(tmp_path / "run") == ["steps_5-6_rank_0.pt.trace.json.gz", "steps_5-6_rank_0.txt"]


def test_a_profile_that_cannot_be_written_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / profile.FOLDER).write_text("in the way")
    run(settings(write_corpus(tmp_path), folder, *SMALL, "--parallel.dp=1", "--training.steps=2", "--run.profile=1:2"))
    (event,) = events(folder, "profile")
    assert "rank 0: the profile of steps 1 to 1 is lost: " in event["message"] and "could not be written" in event["message"]
    assert len(curve(folder)) == 2
