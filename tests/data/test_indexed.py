"""Token files: byte-identical to the format, and every kind of damage named."""

from __future__ import annotations

import errno
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from neox_native.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from neox_native.errors import UserError
from tests.data.corpora import CODES, file_bytes, random_documents, write_files


def write(prefix: Path, documents: list[list[int]], dtype: type[np.integer] = np.uint16) -> str:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, np.int64))
    return str(prefix)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("count", [0, 1, 50])
def test_writer_is_byte_identical_to_the_format(tmp_path: Path, dtype: str, count: int) -> None:
    documents = random_documents(seed=count, count=count, vocab_size=120)
    prefix = write(tmp_path / "text", documents, np.dtype(dtype).type)
    assert (Path(prefix + ".idx").read_bytes(), Path(prefix + ".bin").read_bytes()) == file_bytes(documents, dtype)


@pytest.mark.parametrize("dtype", CODES)
def test_reader_returns_every_document_and_every_part_of_it(tmp_path: Path, dtype: str) -> None:
    documents = random_documents(seed=3, count=20, vocab_size=120)
    files = IndexedDataset(write_files(tmp_path / "text", documents, dtype))
    assert len(files) == 20
    for number, document in enumerate(documents):
        assert files.get(number).tolist() == document
        assert (
            files.get(number, len(document) // 2, len(document) // 3).tolist()
            == document[len(document) // 2 :][: len(document) // 3]
        )


def test_the_type_follows_the_vocabulary() -> None:
    assert token_dtype(65499) is np.uint16 and token_dtype(65500) is np.int32


def test_append_files_concatenates_exactly(tmp_path: Path) -> None:
    parts = [random_documents(seed, 7) for seed in range(3)]
    prefixes = [write_files(tmp_path / f"part{number}", part) for number, part in enumerate(parts)]
    with IndexedWriter(tmp_path / "all", np.uint16) as writer:
        for prefix in prefixes:
            writer.append_files(IndexedDataset(prefix))
    assert ((tmp_path / "all.idx").read_bytes(), (tmp_path / "all.bin").read_bytes()) == file_bytes(sum(parts, []))


def test_an_interrupted_writer_leaves_the_old_files_and_no_others(tmp_path: Path) -> None:
    prefix = write_files(tmp_path / "text", [[1, 2]])
    before = file_bytes([[1, 2]])
    with pytest.raises(KeyboardInterrupt), IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.array([3]))
        raise KeyboardInterrupt
    assert (Path(prefix + ".idx").read_bytes(), Path(prefix + ".bin").read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.bin", "text.idx"]


@pytest.mark.parametrize("code, way_out", [(errno.ENOSPC, "No space left on device"), (errno.EIO, "Input/output error")])
def test_a_disk_that_fails_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, way_out: str
) -> None:
    def fails(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UserError, match=rf"text could not be written: {way_out}; free space"):
        write(tmp_path / "text", [[1, 2]])
    assert not list(tmp_path.iterdir())


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The system refuses to make any file larger, as a full disk would."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("num_bytes", [0, 1000, 40_000, 79_999])
def test_a_disk_that_fills_at_any_write_is_a_sentence_and_leaves_nothing(tmp_path: Path, num_bytes: int) -> None:
    with pytest.raises(UserError, match="text.* could not be written: File too large"), largest_file(num_bytes):
        write(tmp_path / "text", [[1] * 1000] * 40)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_while_a_document_is_taken_back_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="text.bin could not be written: File too large"), largest_file(100):
        with IndexedWriter(tmp_path / "text", np.uint16) as writer:
            writer.add(np.array([1] * 1000, np.uint16))
            writer.discard_document()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("token", [65536, -1])
def test_a_token_that_the_type_cannot_hold_is_refused(tmp_path: Path, token: int) -> None:
    with pytest.raises(UserError, match=f"uint16 tokens up to 65535, but a document holds id {token}"):
        write(tmp_path / "text", [[1, token]])


def test_a_document_too_long_for_the_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox_native.data.indexed.MAX_TOKENS_PER_DOCUMENT", 3)
    with pytest.raises(UserError, match="document 1 of .* has 4 tokens, the format holds at most 3"):
        write(tmp_path / "text", [[1, 2, 3], [1, 2, 3, 4]])


def damaged(prefix: str, end: str, change: object) -> None:
    path = Path(prefix + end)
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]


@pytest.mark.parametrize(
    "end, change, sentence",
    [
        (".bin", lambda old: old[:-1], r"text\.bin is truncated: it has 7 bytes, text\.idx describes 8"),
        (".bin", lambda old: old + b"0", r"text\.bin is too long: it has 9 bytes"),
        (".idx", lambda old: old[:20], r"text\.idx is truncated: 20 bytes, its header alone takes 34"),
        (".idx", lambda old: old[:-3], r"text\.idx is truncated: it has 79 bytes, its header describes 82"),
        (".idx", lambda old: old + b"000", r"text\.idx is too long"),
        (".idx", lambda old: old + b"00", "a Megatron multimodal file"),
        (".idx", lambda old: b"", "instead of b'MMIDIDX"),
        (".idx", lambda old: b"X" + old[1:], r"starts with b'XMIDIDX\\x00\\x00' instead of b'MMIDIDX"),
        (".idx", lambda old: b"TNTIDX\0\0" + old[8:], "old TNTIDX format .*again with tools.prepare_data"),
        (".idx", lambda old: old[:9] + struct.pack("<Q", 2) + old[17:], "has version 2, only version 1"),
        (".idx", lambda old: old[:17] + b"\x06" + old[18:], "type code 6"),
        (".idx", lambda old: old[:34] + struct.pack("<i", -5) + old[38:], "gives document 0 a negative size"),
    ],
)
def test_damage_is_named(tmp_path: Path, end: str, change: object, sentence: str) -> None:
    prefix = write_files(tmp_path / "text", [[1], [2, 3, 4]])
    damaged(prefix, end, change)
    with pytest.raises(UserError, match=sentence):
        IndexedDataset(prefix)


@pytest.mark.parametrize("end", [".idx", ".bin"])
def test_a_missing_file_is_named(tmp_path: Path, end: str) -> None:
    prefix = write_files(tmp_path / "text", [[1]])
    Path(prefix + end).unlink()
    with pytest.raises(UserError, match=rf"text\{end} does not exist"):
        IndexedDataset(prefix)
