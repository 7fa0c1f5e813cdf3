"""Token files: a `.bin` of raw tokens and an `.idx` that says where each sequence lies.

[Note: the .idx format] The format of GPT-NeoX (MMapIndexedDataset) and Megatron (IndexedDataset), little-endian:

    magic "MMIDIDX\\0\\0" | u64 version 1 | u8 dtype code | u64 N sequences | u64 D = documents + 1
    i32 sizes[N] (tokens) | i64 pointers[N] (bytes into the .bin) | i64 document_starts[D] (first sequence of each)

A `.bin` holds nothing but tokens. GPT-NeoX treats every *sequence* as a document, and so does this package.

Files are written under temporary names, synced and renamed, the `.bin` and what made the two ([Note: the sidecar] of
`sidecar.py`) before the `.idx`: a prefix whose `.idx` exists is whole.
"""

from __future__ import annotations

import json
import os
import struct
from array import array
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from neox_native.durable import discard, disk_errors_named, new_file, remove_file, sync_and_rename, sync_file, write_whole, writing
from neox_native.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
MAX_TOKENS_PER_DOCUMENT = 2**31 - 1
"""Sizes are stored as i32."""
PIECE = 2**16
"""Entries of an index that are checked at once."""
SUFFIX = ".about.json"
"""Ends the name of the sidecar."""
IGNORED = -100
"""Label of a token that the model is not trained to predict."""


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The type GPT-NeoX stores tokens in: u16 below 65500 ids, else i32."""
    return np.uint16 if vocab_size < 65500 else np.int32


class IndexedDataset:
    """Read-only view of PREFIX.idx and PREFIX.bin; nothing but the sizes is copied into memory.

    Raises `UserError` where the files are missing, damaged, or of a kind that cannot be read.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.idx_path, self.bin_path = Path(self.prefix + ".idx"), Path(self.prefix + ".bin")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise UserError(
                    f"data: {path} does not exist; name token files by their common prefix, without .idx or .bin "
                    f"(here {self.prefix!r}), and make them with tools/prepare_data.py."
                )
        self.dtype, num_sequences, num_starts = _read_header(self.idx_path)
        raw = np.memmap(self.idx_path, np.uint8, mode="r").view(np.ndarray)
        sizes_end = HEADER.size + 4 * num_sequences
        pointers_end = sizes_end + 8 * num_sequences
        self.sizes = np.array(raw[HEADER.size : sizes_end].view("<i4"))
        """Tokens of each sequence, i32 [N]."""
        self.pointers = raw[sizes_end:pointers_end].view("<i8")
        """Byte in the .bin at which each sequence starts, i64 [N]."""
        self.document_starts = raw[pointers_end : pointers_end + 8 * num_starts].view("<i8")
        """First sequence of each document and, at the end, N; i64 [D]."""
        self.num_bytes = self.bin_path.stat().st_size
        self._check_sizes()
        self._check_documents()
        if num_starts == 1:
            self.document_starts = np.arange(num_sequences + 1)
        self._tokens = (
            np.memmap(self.bin_path, self.dtype, mode="r").view(np.ndarray) if self.num_bytes else np.empty(0, self.dtype)
        )

    def _check_sizes(self) -> None:
        """Pointers are redundant: each is the running total of the sizes before it, and the last size ends the .bin."""
        if len(self.sizes) and self.sizes.min() < 0:
            document = int((self.sizes < 0).argmax())
            raise self._damaged(f"gives document {document} a negative size")
        itemsize, expected = self.dtype.itemsize, 0
        for first in range(0, len(self), PIECE):
            ends = expected + itemsize * np.cumsum(self.sizes[first : first + PIECE], dtype=np.int64)
            starts = np.concatenate([[expected], ends[:-1]])
            wrong = np.flatnonzero(self.pointers[first : first + PIECE] != starts)
            if len(wrong):
                document = first + int(wrong[0])
                raise self._damaged(
                    f"lets document {document} start at byte {self.pointers[document]:,} of {self.bin_path.name}, but "
                    f"those before it end at byte {starts[wrong[0]]:,}"
                )
            expected = int(ends[-1])
        if self.num_bytes != expected:
            state = "truncated" if self.num_bytes < expected else "too long"
            raise UserError(
                f"data: {self.bin_path} is {state}: it has {self.num_bytes:,} bytes, {self.idx_path.name} describes "
                f"{expected:,}; copy or prepare the pair again."
            )

    def _check_documents(self) -> None:
        """The first document starts at sequence 0, none before the one in front of it, and the last ends with the
        sequences. Programs that know sequences alone write a single 0."""
        starts, before = self.document_starts, 0
        for first in range(0, len(starts), PIECE):
            piece = starts[first : first + PIECE]
            back = np.flatnonzero(piece < np.concatenate([[before], piece[:-1]]))
            if len(back):
                document = first + int(back[0])
                raise self._damaged(f"lets document {document} start at sequence {starts[document]:,}, before the one in front")
            before = int(piece[-1])
        span = [int(start) for start in starts[:: max(1, len(starts) - 1)]]
        if span not in ([0], [0, len(self)]):
            raise self._damaged(
                f"has {len(self):,} sequences, but its documents go from {' to '.join(map(str, span)) or 'none'}"
            )

    def _damaged(self, what: str) -> UserError:
        return UserError(f"data: {self.idx_path} {what}; it is damaged, prepare it again.")

    def __len__(self) -> int:
        """Number of sequences; each is a document."""
        return len(self.sizes)

    def get(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of one document, a view into the file; `length` None reads to its end."""
        size = int(self.sizes[document])
        stop = size if length is None else offset + length
        assert 0 <= offset <= stop <= size, (document, offset, length, size)
        first = int(self.pointers[document]) // self.dtype.itemsize
        return self._tokens[first + offset : first + stop]


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """Element type, number of sequences, number of document starts; refuses what [Note: the .idx format] does not
    describe."""
    with path.open("rb") as file:
        head = file.read(HEADER.size)
        file_size = os.fstat(file.fileno()).st_size
    if head.startswith(OLD_MAGIC):
        raise UserError(
            f'data: {path} is in the old TNTIDX format (GPT-NeoX\'s data_impl "lazy" or "cached"), which is not read; '
            "prepare the text again with tools/prepare_data.py, or with GPT-NeoX's preprocess_data.py --dataset-impl "
            "mmap."
        )
    if not head.startswith(MAGIC[: len(head)]) or not head:
        raise UserError(f"data: {path} starts with {head[:9]!r} instead of {MAGIC!r}; it is no token index file.")
    if len(head) < HEADER.size:
        raise UserError(
            f"data: {path} is truncated: {len(head)} bytes, its header alone takes {HEADER.size}; copy or prepare it again."
        )
    _, version, code, num_sequences, num_starts = HEADER.unpack(head)
    if version != VERSION:
        raise UserError(f"data: {path} has version {version}, only version {VERSION} is read; prepare the text again.")
    if code not in DTYPES:
        raise UserError(
            f"data: {path} stores its tokens with type code {code}; only integers are tokens: codes "
            f"{', '.join(map(str, DTYPES))}. Prepare the text again."
        )
    expected = HEADER.size + 12 * num_sequences + 8 * num_starts
    if file_size == expected + num_sequences and num_sequences:
        raise UserError(f"data: {path} carries a mode for each sequence (a Megatron multimodal file); only text is read.")
    if file_size != expected:
        state = "truncated" if file_size < expected else "too long"
        raise UserError(
            f"data: {path} is {state}: it has {file_size:,} bytes, its header describes {expected:,}; copy or prepare it again."
        )
    return np.dtype(DTYPES[code]).newbyteorder("<"), num_sequences, num_starts


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx; used in a `with` block, whose clean end gives them their names.

    On an exception the temporary files are removed and whatever stood under the final names stays; what a killed writer
    of this prefix left is removed at the start. Raises `UserError` for a full disk, a prefix that another process writes,
    a document of 2^31 tokens or more, or an id that the type cannot hold.

    Args:
        about: what the sidecar says, but for the counts; None writes none.
    """

    def __init__(self, prefix: str | Path, dtype: type[np.integer], about: dict[str, Any] | None = None) -> None:
        self.prefix, self.dtype, self.about = str(prefix), np.dtype(dtype), about
        self.num_tokens = 0
        self._sizes = array("i")
        self._document_starts = array("q", [0])
        self._open_size = 0
        self._idx_path, self._bin_path = Path(self.prefix + ".idx"), Path(self.prefix + ".bin")
        self._about_path = Path(self.prefix + SUFFIX)
        self._stack = ExitStack()

    def __enter__(self) -> IndexedWriter:
        with ExitStack() as stack:
            stack.enter_context(writing(Path(self.prefix), self._bin_path, self._idx_path, self._about_path))
            with disk_errors_named(self._bin_path):
                self._bin = new_file(self._bin_path)
            stack.callback(discard, self._bin)
            self._stack = stack.pop_all()
        return self

    def add(self, tokens: np.ndarray) -> None:
        """Appends tokens to the open document."""
        stored = tokens.astype(self.dtype, copy=False)
        if self.dtype.itemsize < tokens.dtype.itemsize and (stored != tokens).any():
            refused = tokens[stored != tokens][0]
            raise UserError(
                f"{self.prefix}.bin stores {self.dtype} tokens up to {np.iinfo(self.dtype).max}, but a document holds "
                f"id {refused}."
            )
        with disk_errors_named(self._bin_path):
            self._bin.write(stored.tobytes())
        self._open_size += len(tokens)
        self.num_tokens += len(tokens)

    def end_document(self) -> None:
        """Closes the open document, which may be empty."""
        if self._open_size > MAX_TOKENS_PER_DOCUMENT:
            raise UserError(
                f"document {len(self._sizes)} of {self.prefix} has {self._open_size:,} tokens, the format holds at most "
                f"{MAX_TOKENS_PER_DOCUMENT:,}; cut it into several documents."
            )
        self._sizes.append(self._open_size)
        self._document_starts.append(len(self._sizes))
        self._open_size = 0

    def discard_document(self) -> None:
        """Takes back what was added to the open document."""
        with disk_errors_named(self._bin_path):
            self._bin.seek(-self._open_size * self.dtype.itemsize, os.SEEK_CUR)
            self._bin.truncate()
        self.num_tokens -= self._open_size
        self._open_size = 0

    def add_document(self, tokens: np.ndarray) -> None:
        """Appends one whole document of token ids [n]."""
        self.add(tokens)
        self.end_document()

    def append_files(self, source: IndexedDataset) -> None:
        """Appends every sequence and document of another pair of files of the same type."""
        assert source.dtype == self.dtype and not self._open_size
        first = len(self._sizes)
        self._sizes.frombytes(source.sizes.astype(np.int32).tobytes())
        self._document_starts.frombytes((source.document_starts[1:] + first).astype(np.int64).tobytes())
        self.num_tokens += int(source.sizes.sum(dtype=np.int64))
        with disk_errors_named(self._bin_path), source.bin_path.open("rb") as file:
            while block := file.read(1 << 24):
                self._bin.write(block)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:
            if kind is None:
                assert not self._open_size, "end_document() closes every document"
                with disk_errors_named(self.prefix):
                    self._finish()

    def _finish(self) -> None:
        """The .idx must never describe another .bin: the old .idx goes first, the new one comes last."""
        idx = new_file(self._idx_path)
        self._stack.callback(discard, idx)
        self._write_index(idx)
        sync_file(idx)
        remove_file(self._idx_path)
        remove_file(self._about_path)
        if self.about is not None:
            content = self.about | {"documents": len(self._sizes), "tokens": self.num_tokens}
            write_whole(self._about_path, json.dumps(content, indent=1).encode())
        sync_and_rename(self._bin, self._bin_path)
        sync_and_rename(idx, self._idx_path)

    def _write_index(self, idx: BinaryIO) -> None:
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        sizes = np.frombuffer(self._sizes, np.int32) if self._sizes else np.empty(0, np.int32)
        idx.write(HEADER.pack(MAGIC, VERSION, code, len(sizes), len(self._document_starts)))
        idx.write(sizes.astype("<i4").tobytes())
        pointers = np.cumsum(sizes, dtype=np.int64)
        idx.write(((pointers - sizes) * self.dtype.itemsize).astype("<i8").tobytes())
        idx.write(np.frombuffer(self._document_starts, np.int64).astype("<i8").tobytes())
