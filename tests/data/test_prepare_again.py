"""Preparations that were killed, refused or cut short, and what the next one makes of them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from neox_native.data.preparation import prepare as module
from neox_native.data.preparation.part import Recipe, write_json
from neox_native.durable import temporary_name, writing
from neox_native.errors import UserError
from tests.data.corpora import file_bytes, write_files
from tests.data.test_documents import write_packed
from tests.data.test_indexed import largest_file
from tests.data.test_prepare import files_of, jsonl, pytestmark, quietly, small_parts, texts

__all__ = ["pytestmark", "small_parts"]  # in force here too


def test_parts_of_another_preparation_are_refused(tmp_path: Path) -> None:
    write_packed(tmp_path / "a.jsonl", jsonl(texts(1, 6)) + b"{\n")
    with pytest.raises(UserError, match="are faulty"):
        quietly([tmp_path / "a.jsonl"], tmp_path / "out")
    with pytest.raises(UserError, match="out.parts holds parts of a preparation with other inputs or settings"):
        quietly([tmp_path / "a.jsonl"], tmp_path / "out", Recipe(append_eod=True), share=1.0)


def test_two_preparations_of_one_prefix_at_a_time_are_refused(tmp_path: Path) -> None:
    write_packed(tmp_path / "a.jsonl", jsonl(["x"]))
    with writing(tmp_path / "out.parts"):
        with pytest.raises(UserError, match="out.parts is being written by another process"):
            quietly([tmp_path / "a.jsonl"], tmp_path / "out")


def test_finished_files_are_not_overwritten(tmp_path: Path) -> None:
    write_packed(tmp_path / "a.jsonl", jsonl(["x"]))
    quietly([tmp_path / "a.jsonl"], tmp_path / "out")
    with pytest.raises(UserError, match="out.idx exists already; remove it or choose another --output"):
        quietly([tmp_path / "a.jsonl"], tmp_path / "out")


def test_a_preparation_killed_after_joining_ends_well_when_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_packed(tmp_path / "a.jsonl", jsonl(texts(1, 60)))

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "remove_folder", killed)
        quietly([tmp_path / "a.jsonl"], tmp_path / "out")
    (tmp_path / "out.lock").touch()
    with pytest.raises(UserError, match="other inputs or settings"):
        quietly([tmp_path / "a.jsonl"], tmp_path / "out", Recipe(append_eod=True))
    assert quietly([tmp_path / "a.jsonl"], tmp_path / "out").documents == 60
    assert files_of(tmp_path / "out") == file_bytes([list(text.encode()) for text in texts(1, 60)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.about.json", "out.bin", "out.idx"]


def test_files_of_another_origin_are_not_taken_for_the_joined_parts(tmp_path: Path) -> None:
    write_packed(tmp_path / "a.jsonl", jsonl(["x"]) + b"{\n")
    with pytest.raises(UserError, match="are faulty"):
        quietly([tmp_path / "a.jsonl"], tmp_path / "out")
    write_files(tmp_path / "out", [[1, 2]])
    with pytest.raises(UserError, match="out.idx exists already"):
        quietly([tmp_path / "a.jsonl"], tmp_path / "out", share=1.0)
    assert files_of(tmp_path / "out") == file_bytes([[1, 2]])


@pytest.mark.parametrize("name", ["out.parts/part-000000.bin", "out.bin", "out.idx", "out.about.json", "out.parts"])
def test_what_a_killed_preparation_left_is_removed_by_the_next(tmp_path: Path, name: str) -> None:
    write_packed(tmp_path / "a.jsonl", jsonl(["x"]))
    leftover = temporary_name(tmp_path / name)
    leftover.parent.mkdir(exist_ok=True)
    leftover.touch()
    quietly([tmp_path / "a.jsonl"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.about.json", "out.bin", "out.idx"]


def test_a_full_disk_in_a_worker_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_packed(tmp_path / "a.jsonl", jsonl(texts(1, 60)))
    parent, sync = os.getpid(), os.fsync

    def full(descriptor: int) -> None:
        if os.getpid() != parent:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="part-.* could not be written: No space left on device"):
        quietly([tmp_path / "a.jsonl"], tmp_path / "out", workers=2)
    assert not list(tmp_path.glob("out.idx")) and not list((tmp_path / "out.parts").glob("*.tmp"))
    monkeypatch.setattr(os, "fsync", sync)
    quietly([tmp_path / "a.jsonl"], tmp_path / "out", workers=2)
    assert files_of(tmp_path / "out") == file_bytes([list(text.encode()) for text in texts(1, 60)])


def test_a_disk_that_fills_at_the_report_leaves_no_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="report.json could not be written: File too large"), largest_file(10):
        write_json(tmp_path / "report.json", list(range(100)))
    assert not list(tmp_path.iterdir())


def test_a_killed_worker_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_packed(tmp_path / "a.jsonl", jsonl(texts(1, 60)))
    parent, sync = os.getpid(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: sync(file) if os.getpid() == parent else os._exit(9))
    with pytest.raises(UserError, match="a worker process was killed.* finished parts are kept"):
        quietly([tmp_path / "a.jsonl"], tmp_path / "out", workers=2)
