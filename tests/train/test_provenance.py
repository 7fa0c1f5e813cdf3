"""What a run's folder tells of its starts, and that a start which trains nothing leaves it as it is."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from neox_native.config.load import load
from neox_native.config.schema import Config
from neox_native.errors import UserError
from neox_native.launch import Ranks
from neox_native.train import folder as folders
from neox_native.train.folder import RunFolder
from tests.checkpoint.small_runs import events, run, settings, write_corpus


def config(run_dir: Path, *changes: str) -> Config:
    return load(None, [f"--run.dir={run_dir}", "--parallel.dp=1", *changes])


def begin(run_dir: Path, step: int, *changes: str) -> list[str]:
    """One start at `step`; what it says has changed."""
    wanted = config(run_dir, *changes)
    folder = RunFolder(wanted, Ranks())
    try:
        return folder.begin(wanted, step)
    finally:
        if folder.lock is not None:
            folder.lock.close()


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob("config*"))


def steps_of(file: Path) -> int:
    return load(file).training.steps


def test_settings_of_each_start_are_kept_under_the_step_at_which_it_began(tmp_path: Path) -> None:
    assert begin(tmp_path, 0, "--training.steps=1") == []
    first = (tmp_path / "config.toml").read_bytes()
    assert begin(tmp_path, 100, "--training.steps=1") == [] and (tmp_path / "config.toml").read_bytes() == first
    changed = ["training.steps: 1 -> 2", "optimizer.lr: 0.001 -> 0.002"]
    assert begin(tmp_path, 100, "--training.steps=2", "--optimizer.lr=2e-3") == changed
    assert names(tmp_path) == ["config.toml", "config_step_000000000.toml"]
    assert (tmp_path / "config_step_000000000.toml").read_bytes() == first
    for number in 3, 4:  # again from step 100: those before had saved nothing
        begin(tmp_path, 100, f"--training.steps={number}")
    kept = {name: steps_of(tmp_path / name) for name in names(tmp_path)}
    assert kept == {
        "config.toml": 4, "config_step_000000000.toml": 1, "config_step_000000100.toml": 2, "config_step_000000100_2.toml": 3
    }  # fmt: skip


def test_crash_between_keeping_the_old_settings_and_writing_the_new_leaves_no_second_copy(tmp_path: Path) -> None:
    begin(tmp_path, 0, "--training.steps=1")
    (tmp_path / "config_step_000000000.toml").write_bytes((tmp_path / "config.toml").read_bytes())
    (tmp_path / "config_step_000000000.toml.tmp-01").touch()
    assert begin(tmp_path, 5, "--training.steps=2") == ["training.steps: 1 -> 2"]
    assert names(tmp_path) == ["config.toml", "config_step_000000000.toml"]


def test_settings_of_earlier_versions_and_damaged_ones_are_kept(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[training]\nsteps = 7\n")
    assert "training.steps: 7 -> 8" in begin(tmp_path, 3, "--training.steps=8")
    (tmp_path / "config.toml").write_bytes(b"\xff[")
    (changed,) = begin(tmp_path, 3, "--training.steps=8")
    assert changed.startswith("config.toml of the last start cannot be compared: ")
    assert steps_of(tmp_path / "config_earlier.toml") == 7 and (tmp_path / "config_earlier_2.toml").read_bytes() == b"\xff["


def test_run_that_is_set_aside_takes_its_settings_along(tmp_path: Path) -> None:
    begin(tmp_path, 0, "--training.steps=1")
    begin(tmp_path, 9, "--training.steps=2")
    (tmp_path / "metrics.jsonl").touch()
    begin(tmp_path, 0, "--training.steps=2", "--checkpoint.resume=none")
    assert names(tmp_path) == ["config.toml"]
    aside = tmp_path / "before-1"
    assert steps_of(aside / "config.toml") == 2 and steps_of(aside / "config_step_000000000.toml") == 1


def test_start_whose_disk_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr(folders, "write_whole", full)
    with pytest.raises(UserError, match="No space left on device"):
        begin(tmp_path / "new" / "run", 0)
    assert not (tmp_path / "new").exists()


def test_of_two_first_starts_one_begins(tmp_path: Path) -> None:
    starts = [RunFolder(config(tmp_path / "run"), Ranks()) for _ in range(2)]
    starts[0].begin(starts[0].config, 0)
    with pytest.raises(UserError, match=f"is in use by another command .* process {os.getpid()} on host"):
        starts[1].begin(starts[1].config, 0)
    assert (tmp_path / "run" / ".lock").is_file()
    assert starts[0].lock is not None
    starts[0].lock.close()


def test_events_tell_each_start_that_trained_and_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    corpus, folder = write_corpus(tmp_path), tmp_path / "run"
    first = settings(corpus, folder, "--parallel.dp=1", "--training.steps=2", "--logging.tensorboard=true")
    run(first)
    (started,) = events(folder, "started")
    assert (started["step"], started["world_size"], started["layout"]) == (0, 1, "pp 1 x dp 1 x tp 1")
    assert len(started["code"]) == 12 and started["torch"] and len(started["hosts"]) == 1

    def tree() -> dict[str, tuple[int, bytes | None]]:
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in folder.rglob("*")}

    before = tree()
    run(replace(first, optimizer=replace(first.optimizer, lr=0.5)))
    assert tree() == before and "nothing to do: step 2" in capfd.readouterr().out
    run(replace(first, training=replace(first.training, steps=3)))
    assert "changed since the last start:\n  training.steps: 2 -> 3\n" in capfd.readouterr().out
    (resumed,) = events(folder, "resumed")
    assert resumed["step"] == 2 and resumed["changed"] == ["training.steps: 2 -> 3"] and resumed["checkpoint"].endswith("step_000000002")
    assert events(folder, "started") == [started] and names(folder) == ["config.toml", "config_step_000000000.toml"]
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
