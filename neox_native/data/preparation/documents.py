"""Documents in files: found, cut into parts of like size, and read one by one in bounded memory.

A line of a `.jsonl` file is a document, a blank one is none; any other file is one document as a whole. `.gz`, `.xz` and `.zst`
files are unpacked on the fly. A byte-order mark is no text.

A line is held in memory as a whole, up to a limit, another file in chunks. A file that has no place to cut it in 64 MiB is left out,
with that reason.

[Note: exact cuts] A text is cut where the word patterns of GPT-2, GPT-NeoX-20B, GPT-4, GPT-4o and Llama 3 begin a
piece whatever follows: before a space or tab that stands after anything else, and before a line's end, comma or full
stop after a letter (a line's end after a sign may belong to the sign's piece). White space stays in one chunk with what
follows it, which decides how the patterns split it. Nothing on the right of a cut composes with what is on its left,
so that NFC does not cross it either. A special token that holds white space could be cut; none of these models has one.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import lzma
import re
import string
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from neox_native.data.preparation.zst import can_unpack, unpacked_zst
from neox_native.errors import UserError

PACKED_SUFFIXES = (".gz", ".xz", ".zst")
SMALLEST_PART_BYTES, LARGEST_PART_BYTES, PARTS_WANTED = 4 << 20, 256 << 20, 256
CHUNK_BYTES = 1 << 20
LONGEST_LINE_BYTES = 256_000_000
LONGEST_CHUNKS = 64
"""Held at once of a text that cannot be cut."""
LETTERS = r"0-9A-Za-z\u0410-\u044f\u0621-\u063a\u0641-\u064a\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
"""ASCII's letters and digits, and the most frequent of Cyrillic, Arabic, Japanese, Chinese and Korean: letters in
every version of Unicode."""
LAST_CUT = re.compile(rf"(?s:.*)(?:(?<=\S)(?=[ \t])|(?<=[{LETTERS}])(?=[\r\n、。，]))")
"""Where text may be cut, see [Note: exact cuts]; matches up to the last such place."""
BYTE_ORDER_MARK = "\ufeff"
"""Begins files of some editors, and lines where such files were joined."""


class Piece(NamedTuple):
    """A file, or the lines that begin in bytes [start, stop) of a plain .jsonl file."""

    path: str
    start: int
    stop: int


class BadLine(ValueError):
    """A line of a .jsonl file that holds no document; the message is the reason."""


def is_jsonl(path: str) -> bool:
    """Whether each line is a document."""
    return is_kind(path, ".jsonl")


def is_kind(path: str, ending: str) -> bool:
    """Whether a file's name ends so, however it is packed."""
    for suffix in PACKED_SUFFIXES:
        path = path.removesuffix(suffix)
    return path.endswith(ending)


def find_files(inputs: list[str]) -> list[str]:
    """Files that paths, folders and globs name, in the order given; within a folder or glob sorted, hidden ones left out.

    Raises `UserError` for an input that names nothing.
    """
    found = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            paths = sorted(p for p in path.rglob("*") if p.is_file())
            files = [str(p) for p in paths if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        else:
            files = [name] if path.is_file() else sorted(f for f in glob.glob(name, recursive=True) if Path(f).is_file())
        if not files:
            raise UserError(f"--input {name!r} names no file; give files, folders or quoted globs.")
        if not path.is_dir():
            for file in files:
                _refuse_documents_in_json(file)
        found += files
    if any(file.endswith(".zst") for file in found) and not can_unpack():
        raise UserError(
            "--input names .zst files, but neither the package zstandard nor the program zstd that unpack them is "
            "installed; install one of them: pip install zstandard."
        )
    return found


def _refuse_documents_in_json(path: str) -> None:
    """Raises `UserError` for a .json file that was named and holds documents: it would be read as one text."""
    if not is_kind(path, ".json"):
        return
    with unpacked(path) as file:
        begins = file.read(CHUNK_BYTES).decode("utf-8", errors="replace").removeprefix(BYTE_ORDER_MARK).lstrip()
    first, _, rest = begins.partition("\n")
    if re.match(r"\[\s*\{", begins):
        found, way_out = "is an array of objects", f"jq -c '.[]' {path} > {Path(path).stem}.jsonl"
    elif first.rstrip().startswith("{") and first.rstrip().endswith("}") and rest.lstrip().startswith("{"):
        found, way_out = "has an object a line", "rename it"
    else:
        return
    raise UserError(
        f"--input {path} {found}, and documents are read from the lines of a .jsonl file: {way_out}. To prepare it as the "
        "text that it is, name its folder."
    )


def cut_into_parts(files: list[str]) -> list[list[Piece]]:
    """Parts of about equal bytes, the same for any number of workers. A packed file is never cut."""
    sizes = {file: Path(file).stat().st_size for file in files}
    total = sum(sizes[file] for file in files)
    part_bytes = min(max(total // PARTS_WANTED, SMALLEST_PART_BYTES), LARGEST_PART_BYTES)
    parts: list[list[Piece]] = [[]]
    room = part_bytes
    for file in files:
        step = part_bytes if is_jsonl(file) and file.endswith(".jsonl") else max(1, sizes[file])
        for start in range(0, max(1, sizes[file]), step):
            if room <= 0:
                parts.append([])
                room = part_bytes
            parts[-1].append(Piece(file, start, min(start + step, sizes[file])))
            room -= min(step, sizes[file] - start)
    return parts


@contextmanager
def unpacked(path: str) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked. Raises `UserError` where a packed file is damaged."""
    try:
        if path.endswith(".gz"):
            with gzip.open(path) as file:
                yield file  # type: ignore[misc]
        elif path.endswith(".xz"):
            with lzma.open(path) as file:
                yield file  # type: ignore[misc]
        elif path.endswith(".zst"):
            with unpacked_zst(path) as file:
                yield file
        else:
            with open(path, "rb") as file:
                yield file
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{path} cannot be unpacked ({error}); it is damaged or truncated, fetch it again.") from error


def lines_of(piece: Piece, longest: int = LONGEST_LINE_BYTES) -> Iterator[bytes]:
    """The lines that begin in the piece, with their ends. A line longer than `longest` comes as its first `longest` + 1
    bytes."""
    with unpacked(piece.path) as file:
        is_plain = piece.path.endswith(".jsonl")
        if is_plain and piece.start:
            file.seek(piece.start - 1)
            _skip_line(file)
        position = file.tell() if is_plain else 0
        while not (is_plain and position >= piece.stop) and (line := file.readline(longest + 1)):
            position += len(line)
            if len(line) > longest and not line.endswith(b"\n"):
                position += _skip_line(file)
            yield line


def _skip_line(file: BinaryIO) -> int:
    """Reads up to the next line; returns how many bytes that took."""
    skipped = 0
    while block := file.readline(CHUNK_BYTES):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped


def texts_of(path: str) -> Iterator[str]:
    """A whole file in chunks that are encoded to the same tokens as the whole, see [Note: exact cuts].

    Raises `BadLine` where it is not UTF-8, or has nowhere to be cut in `LONGEST_CHUNKS` chunks.
    """
    pending: list[str] = []
    with unpacked(path) as file:
        for text in _decoded(file):
            if cut := LAST_CUT.match(text):
                yield "".join([*pending, text[: cut.end()]])
                pending, text = [], text[cut.end() :]
            pending.append(text)
            if len(pending) > LONGEST_CHUNKS:
                raise BadLine(f"more than {LONGEST_CHUNKS * CHUNK_BYTES:,} bytes without white space between words")
    yield "".join(pending)


def _decoded(file: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # a byte-order mark at the start is no text
    try:
        while block := file.read(CHUNK_BYTES):
            yield decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise BadLine("not UTF-8") from error


def text_of_line(line: bytes, key: str) -> str:
    """The document of a .jsonl line. Raises `BadLine` with the reason where there is none."""
    return _text(_object(line), key)


def check_template(template: str) -> None:
    """Raises `UserError` where the prompt's template is none."""
    try:
        template.format(**{name: "" for _, name, _, _ in string.Formatter().parse(template) if name})
    except (ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"--prompt {template!r} is no template ({error}); write keys as {{key}} and braces that stand for themselves twice."
        ) from error


def prompt_and_response(line: bytes, template: str, key: str) -> tuple[str, str]:
    """The filled-in template, whose {fields} are keys of the line, and the response. Raises `BadLine`."""
    content = _object(line)
    fields = {name: _text(content, name) for _, name, _, _ in string.Formatter().parse(template) if name}
    return template.format(**fields), _text(content, key)


def _object(line: bytes) -> dict[str, object]:
    try:
        content = json.loads(line.decode("utf-8").removeprefix(BYTE_ORDER_MARK))
    except UnicodeDecodeError as error:
        raise BadLine("not UTF-8") from error
    except RecursionError as error:
        raise BadLine("nested too deeply") from error
    except ValueError as error:  # not JSON, or a number that Python refuses to read
        raise BadLine("not JSON") from error
    if not isinstance(content, dict):
        raise BadLine("not a JSON object")
    return content


def _text(content: dict[str, object], key: str) -> str:
    if key not in content:
        raise BadLine(f"no key {key!r}")
    text = content[key]
    if not isinstance(text, str):
        raise BadLine(f"{key!r} is not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadLine(f"{key!r} holds half a surrogate pair") from error
    return text
