"""What is written is whole or absent, by one process at a time, and nowhere else than where its name says."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from neox_native import durable
from neox_native.errors import UserError
from tests.ranks import run_ranks


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_as_a_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with durable.replacing(path) as file:
        file.write(b"old")
    with pytest.raises(KeyboardInterrupt), durable.replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_the_disk_refuses_is_a_sentence_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UserError, match="a.json could not be written: No space left on device"):
        with durable.replacing(tmp_path / "a.json") as file:
            file.write(b"new")
    assert not names(tmp_path)


def test_a_folder_under_a_file_is_no_matter_of_space(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="text could not be written: Not a directory; choose another place.$"):
        with durable.writing(tmp_path / "file" / "text"):
            pass


def test_a_lock_and_a_temporary_file_follow_no_symbolic_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "precious").write_text("kept")
    monkeypatch.setattr(durable.secrets, "token_hex", lambda _: "0")
    for link in "text.lock", "a.json.tmp-0":
        (tmp_path / link).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="text could not be written"), durable.writing(tmp_path / "text"):
        pass
    with pytest.raises(UserError, match="a.json could not be written"), durable.replacing(tmp_path / "a.json") as file:
        file.write(b"new")
    assert (tmp_path / "precious").read_text() == "kept"


def test_one_process_writes_at_a_time_and_sweeps_what_was_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "text"
    with durable.writing(path):
        durable.temporary_name(path).mkdir()
        durable.new_file(path).close()
        durable.temporary_name(path.with_name("text2")).mkdir()
        assert len(names(path.parent)) == 4
        with pytest.raises(UserError, match="text is being written by another process"), durable.writing(path):
            pass
    with durable.writing(path):
        assert [name[:10] for name in names(path.parent)] == ["text.lock", "text2.tmp-"]
    assert [name[:10] for name in names(path.parent)] == ["text2.tmp-"]


@pytest.mark.parametrize("file", ["text.tmp-1", "text.lock"])
def test_a_disk_that_fails_at_what_was_left_is_a_sentence_or_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    (tmp_path / "text.tmp-1").touch()
    unlink = os.unlink

    def fails(path: str | Path, *rest: object) -> None:
        if Path(path).name == file:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(path)

    monkeypatch.setattr(os, "unlink", fails)
    if file == "text.lock":
        with durable.writing(tmp_path / "text"):
            pass
        return
    with pytest.raises(UserError, match="text could not be written: Input/output error"):
        with durable.writing(tmp_path / "text"):
            pass


def test_without_locks_nothing_of_others_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    others = durable.temporary_name(tmp_path / "text")
    others.mkdir()
    with durable.writing(tmp_path / "text"), durable.writing(tmp_path / "text"):
        assert others.is_dir()


def test_processes_that_wait_for_a_lock_which_comes_and_goes_exclude_one_another(tmp_path: Path) -> None:
    count = tmp_path / "count"

    def count_up() -> None:
        for _ in range(20):
            with durable.writing(count, wait=True):
                before = int(count.read_text()) if count.exists() else 0
                with durable.replacing(count) as file:
                    file.write(str(before + 1).encode())

    run_ranks(4, count_up)
    assert count.read_text() == "80" and names(tmp_path) == ["count"]
