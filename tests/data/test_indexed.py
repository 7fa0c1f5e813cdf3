"""Token files: byte-identical to the format, and every kind of damage named."""

from __future__ import annotations

import errno
import os
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from neox_native.data import indexed
from neox_native.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from neox_native.data.preparation.prepare import join
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


@pytest.mark.parametrize(
    "code, said",
    [
        (errno.ENOSPC, "No space left on device; free space there or choose another place"),
        (errno.EIO, "Input/output error; choose another place"),
    ],
)
def test_a_disk_that_fails_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    def fails(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UserError, match=rf"text could not be written: {said}.$"):
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


def index(pointers: list[int], starts: list[int]) -> Callable[[bytes], bytes]:
    """Gives an .idx of three sequences, of which the first has 2 tokens, the second none and the third 1, other tables."""
    return lambda old: (
        old[:26] + struct.pack("<Q3i", len(starts), 2, 0, 1) + struct.pack(f"<{3 + len(starts)}q", *pointers, *starts)
    )


@pytest.mark.parametrize(
    "pointers, starts, sentence",
    [
        ([0, 10**15, 4], [0, 1, 2, 3], "document 1 start at byte 1,000,000,000,000,000 of text.bin, but .* end at byte 4"),
        ([2, 6, 6], [0, 1, 2, 3], "document 0 start at byte 2 "),
        ([0, 4, 3], [0, 1, 2, 3], "document 2 start at byte 3 .* end at byte 4; it is damaged, prepare it again"),
        ([-(2**63), 4, 4], [0, 1, 2, 3], "document 0 start at byte -9,223"),
        ([0, 4, 4], [0, 2, 1, 3], "document 2 start at sequence 1, before the one in front"),
        ([0, 4, 4], [-1, 1, 2, 3], "document 0 start at sequence -1, before"),
        ([0, 4, 4], [1, 1, 2, 3], "has 3 sequences, but its documents go from 1 to 3"),
        ([0, 4, 4], [0, 1, 2, 4], "has 3 sequences, but its documents go from 0 to 4"),
        ([0, 4, 4], [0, 1, 2], "has 3 sequences, but its documents go from 0 to 2"),
        ([0, 4, 4], [7], "has 3 sequences, but its documents go from 7"),
        ([0, 4, 4], [], "has 3 sequences, but its documents go from none"),
    ],
)
@pytest.mark.parametrize("piece", [1, 2, 100])
def test_an_index_that_contradicts_itself_is_neither_read_nor_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pointers: list[int], starts: list[int], sentence: str, piece: int
) -> None:
    monkeypatch.setattr(indexed, "PIECE", piece)
    prefix = write_files(tmp_path / "text", [[1, 2], [], [3]])
    join([Path(prefix)], tmp_path / "before")
    damaged(prefix, ".idx", index(pointers, starts))
    with pytest.raises(UserError, match=sentence):
        IndexedDataset(prefix)
    with pytest.raises(UserError, match=sentence):
        join([tmp_path / "before", Path(prefix)], tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("starts", [[0, 1, 2, 3], [0, 0, 2, 3], [0, 3], [0]])
def test_documents_may_span_sequences_and_may_be_untold(tmp_path: Path, starts: list[int]) -> None:
    prefix = write_files(tmp_path / "text", [[1, 2], [], [3]])
    damaged(prefix, ".idx", index([0, 4, 4], starts))
    assert IndexedDataset(prefix).document_starts.tolist() == (starts if len(starts) > 1 else [0, 1, 2, 3])
    join([Path(prefix), Path(prefix)], tmp_path / "merged")
    assert len(IndexedDataset(tmp_path / "merged")) == 6


@pytest.mark.parametrize("end", [".idx", ".bin"])
def test_a_missing_file_is_named(tmp_path: Path, end: str) -> None:
    prefix = write_files(tmp_path / "text", [[1]])
    Path(prefix + end).unlink()
    with pytest.raises(UserError, match=rf"text\{end} does not exist"):
        IndexedDataset(prefix)
