"""A checkpoint that somebody else has touched is skipped for the one before, in a sentence."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neox_native.checkpoint import files, safe, store
from neox_native.checkpoint.resume import find_start
from neox_native.config.schema import Checkpoint
from neox_native.errors import UserError, report_user_errors
from neox_native.launch import Ranks
from tests.checkpoint.test_safe import rewrite


def manifest(content: str) -> Callable[[Path], object]:
    return lambda path: (path / files.MANIFEST).write_text(content)


def listed(name: str) -> Callable[[Path], object]:
    """List one more file in the manifest."""
    record = {"bytes": 0, "crc32": "00000000"}
    return lambda path: manifest(json.dumps({"files": files.read_manifest(path) | {name: record}}))(path)


def without_a_shard(path: Path) -> None:
    records = files.read_manifest(path)
    manifest(json.dumps({"files": {name: record for name, record in records.items() if not name.endswith(".distcp")}}))(path)


def pipe(path: Path) -> None:
    (path / files.MANIFEST).unlink()
    os.mkfifo(path / files.MANIFEST)


def step(value: object) -> Callable[[Path], object]:
    return lambda path: rewrite(path / files.METADATA, json.dumps({"step": value}).encode())


def beyond_the_end(path: Path) -> None:
    index = safe.read_index(path)
    next(iter(index.storage_data.values())).length += 1 << 30
    rewrite(path / safe.INDEX, pickle.dumps(index))


TOUCHED = {
    "infinite size": (manifest('{"files": {"a": {"bytes": Infinity, "crc32": "00000000"}}}'), "Infinity is no number"),
    "overflowing size": (manifest('{"files": {"a": {"bytes": 1e999, "crc32": "00000000"}}}'), "1e999 is no number"),
    "deep": (manifest('{"files": ' + "[" * 100_000), "nests too deeply"),
    "size of another type": (manifest('{"files": {"a": {"bytes": "9", "crc32": "00000000"}}}'), "does not tell the size"),
    "list": (manifest('{"files": [1]}'), "does not tell the size"),
    "pipe": (pipe, "is no plain file"),
    "file above": (listed("../secret"), r"lists '../secret', which is no file of this checkpoint"),
    "file elsewhere": (listed("/etc/passwd"), r"lists '/etc/passwd'"),
    "name that no disk takes": (listed("\ud800"), r"lists '\\ud800'"),
    "shard left out": (without_a_shard, r"points at __0_0.distcp, which is no plain file"),
    "place beyond the end": (beyond_the_end, "which has"),
    "another step": (step(6), "is of step 6, but its folder's name is of step 11"),
    "step of another type": (step("eleven"), "is of step 'eleven'"),
}


@pytest.mark.parametrize("touch, sentence", TOUCHED.values(), ids=TOUCHED.keys())
def test_a_touched_checkpoint_is_skipped_for_the_one_before(tmp_path: Path, touch: Callable, sentence: str) -> None:
    whole, newer = (store.save(tmp_path, n, {"model.a": torch.ones(3)}, {"step": n}, Ranks()) for n in (9, 11))
    touch(newer)
    reports: list[str] = []
    start = find_start(Checkpoint(), tmp_path, Ranks(reports.append))
    assert start is not None and start.path == whole and len(reports) == 1
    with pytest.raises(UserError, match=sentence):
        find_start(Checkpoint(resume=str(newer)), tmp_path, Ranks())


def test_a_folder_that_may_not_be_read_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(UserError, match=rf"{tmp_path} cannot be read: Permission denied"):
        find_start(Checkpoint(), tmp_path, Ranks())


def test_what_the_system_refuses_is_told_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="1"), report_user_errors():
        files.write_json(tmp_path / "a.json", {})
    assert capsys.readouterr().err == f"error: No space left on device ({tmp_path / 'a.json'}).\n"
    with pytest.raises(UserError, match=r"^Saving it failed: No space left on device$"), Ranks().together("Saving it"):
        full(0)
