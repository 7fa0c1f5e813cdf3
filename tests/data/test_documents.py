"""Documents are found, cut and read whole, whatever the cuts."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import tracemalloc
import unicodedata
from functools import partial
from pathlib import Path

import pytest
import regex
import zstandard

from neox_native.data.preparation import documents, zst
from neox_native.data.preparation.documents import BadLine, Piece
from neox_native.errors import UserError


def write_packed(path: Path, content: bytes) -> str:
    """A file whose name says how it is packed."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".xz":
        path.write_bytes(lzma.compress(content))
    elif path.suffix == ".zst":
        half = len(content) // 2  # several frames may follow each other
        path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:])))
    else:
        path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("seed", range(20))
def test_every_line_is_read_once_however_a_file_is_cut(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    lines = [b"x" * draw.randrange(6) + b"\n" for _ in range(30)] + [b"last" * draw.randrange(2)]
    path = write_packed(tmp_path / "some.jsonl", b"".join(lines))
    size = Path(path).stat().st_size
    cuts = sorted({0, size, *(draw.randrange(size + 1) for _ in range(draw.randrange(12)))})
    read = [line for start, stop in zip(cuts, cuts[1:]) for line in documents.lines_of(Piece(path, start, stop))]
    assert read == [line for line in lines if line]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst"])
def test_packed_lines_are_unpacked(tmp_path: Path, suffix: str) -> None:
    path = write_packed(tmp_path / f"some{suffix}", b"a\nb\n")
    assert documents.is_jsonl(path)
    assert list(documents.lines_of(Piece(path, 0, Path(path).stat().st_size))) == [b"a\n", b"b\n"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst"])
@pytest.mark.parametrize("longest", [1, 2, 3, 7, 40])
def test_a_line_is_cut_behind_the_limit_and_the_next_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, longest: int
) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 4)
    lines = [b"a\n", b"b" * 30 + b"\n", b"\n", b"cc\n", b"d" * 7]
    path = write_packed(tmp_path / f"some{suffix}", b"".join(lines))
    cuts = range(0, sum(map(len, lines)) + 1) if suffix == ".jsonl" else [0, 1]
    read = [line for start in cuts[:-1] for line in documents.lines_of(Piece(path, start, start + 1), longest)]
    assert read == [line[: longest + 1] for line in lines]


def test_a_line_without_end_takes_bounded_memory(tmp_path: Path) -> None:
    path = write_packed(tmp_path / "some.jsonl.gz", b"0" * 30_000_000 + b"\nnext\n")
    tracemalloc.start()
    try:
        assert [len(line) for line in documents.lines_of(Piece(path, 0, 1), 1000)] == [1001, 5]
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", [lambda packed: packed[:-9], lambda packed: b"nothing packed"])
def test_a_damaged_packed_file_is_named(tmp_path: Path, suffix: str, damage: object) -> None:
    path = Path(write_packed(tmp_path / f"some.jsonl{suffix}", random.Random(0).randbytes(5000)))
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(UserError, match=f"some.jsonl{suffix} cannot be unpacked .* fetch it again"):
        list(documents.lines_of(Piece(str(path), 0, 0)))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("eighth", range(1, 8))
def test_a_packed_file_damaged_in_the_middle_is_named(tmp_path: Path, suffix: str, eighth: int) -> None:
    draw = random.Random(0)
    path = Path(write_packed(tmp_path / f"some.txt{suffix}", bytes(draw.choice(b"ab\n ") for _ in range(20_000))))
    packed = bytearray(path.read_bytes())
    for place in range(eighth * len(packed) // 8, eighth * len(packed) // 8 + 5):
        packed[place] ^= 0xFF
    path.write_bytes(packed)
    with pytest.raises(UserError, match=f"some.txt{suffix} cannot be unpacked .* fetch it again"):
        list(documents.texts_of(str(path)))


GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD_PATTERNS = {
    "gpt2": rf"{GPT2_WORDS}|\s+(?!\S)|\s+",
    "20b": rf"{GPT2_WORDS}| {{2,24}}|(?:[^\S ]| (?! ))+(?!\S)|(?:[^\S ]| (?! ))+",
    "llama3": rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    rf"{ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*"
    rf"{ENDINGS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
AWKWARD = ["a", "B", "7", " ", "  ", " " * 26, "\n", "\n\n", "\r\n", "\t", "\u3000", "\xa0", "\x1c", "\u2028", "'s"]
AWKWARD += ["don't", "/", ".", "...", "-", "é", "e\u0301", "\u0301", "привет", "مرحبا", "次", "다", "か\u3099", "。"]
AWKWARD += ["、", "，", "ー", "😀", "½", "₂"]


@pytest.mark.parametrize("pattern", WORD_PATTERNS)
def test_a_file_in_chunks_has_the_pieces_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    words, draw, cuts = regex.compile(WORD_PATTERNS[pattern]), random.Random(0), 0
    normalise = partial(unicodedata.normalize, "NFC")
    monkeypatch.setattr(documents, "LONGEST_CHUNKS", 10_000)
    for _ in range(500):
        monkeypatch.setattr(documents, "CHUNK_BYTES", draw.randrange(1, 25))
        text = "".join(draw.choices(AWKWARD, k=draw.randrange(60)))
        chunks = list(documents.texts_of(write_packed(tmp_path / "some.txt", text.encode())))
        assert "".join(chunks) == text
        pieces = [piece for chunk in chunks for piece in words.findall(normalise(chunk))]
        assert pieces == words.findall(normalise(text)), chunks
        cuts += len(chunks) - 1
    assert cuts > 500


LANGUAGES = {
    "russian": "Все счастливые семьи похожи друг на друга.\n",
    "arabic": "مرحبا بالعالم\n\n",
    "chinese": "道可道，非常道。\n\u3000\u3000名可名，非常名。\n",
    "japanese": "吾輩は猫である。名前はまだ無い。\n\n",
    "paragraphs": "A paragraph.\n\nAnother paragraph.\n\n",
    "windows": "A line.\r\n\r\nAnother line.\r\n",
    "one line": "word ",
    "a word a line": "word\n",
    "a letter a line": "다\nя\nو\n字\nぁ\n",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_text_of_any_language_is_read_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1000)
    path = write_packed(tmp_path / "some.txt", (LANGUAGES[language] * 400).encode())
    assert max(len(chunk.encode()) for chunk in documents.texts_of(path)) < 1200


def test_a_text_that_cannot_be_cut_is_held_whole_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 10)
    path = write_packed(tmp_path / "some.txt", b"x" * 640)
    assert list(documents.texts_of(path)) == ["x" * 640]
    with pytest.raises(BadLine, match="more than 640 bytes without white space between words"):
        list(documents.texts_of(write_packed(tmp_path / "some.txt", b"x" * 641)))


@pytest.mark.parametrize("content", [b"fine\n\xff", b"\xc3 word", b"cut off \xc3"])
def test_a_file_that_is_not_utf8_has_no_document(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(BadLine, match="not UTF-8"):
        list(documents.texts_of(write_packed(tmp_path / "some.txt", content)))


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": ', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b'{"body": "a"}', "no key 'text'"),
        (b'{"text": 5}', "'text' is not a string"),
        (rb'{"text": "\ud800"}', "'text' holds half a surrogate pair"),
    ],
)
def test_a_faulty_line_says_why(line: bytes, reason: str) -> None:
    with pytest.raises(BadLine, match=reason):
        documents.text_of_line(line, "text")


def test_a_template_takes_its_fields_from_the_line() -> None:
    line = json.dumps({"q": "why", "context": "here", "a": "so"}).encode()
    assert documents.prompt_and_response(line, "{context}: {q}?\n", "a") == ("here: why?\n", "so")
    with pytest.raises(BadLine, match="no key 'hint'"):
        documents.prompt_and_response(line, "{hint}", "a")


@pytest.mark.parametrize("template", ["{q", "q}", "{q[0]}", "{q.a}", "{}"])
def test_a_template_that_is_none_is_refused(template: str) -> None:
    documents.check_template("{q} {{literally}}")
    with pytest.raises(UserError, match="is no template .* write keys as {key}"):
        documents.check_template(template)


def test_inputs_are_files_folders_and_globs_in_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.py", "b/.hidden/x.txt", "b/.x", "a/z.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    folder = str(tmp_path / "b")
    found = documents.find_files([folder, str(tmp_path / "a" / "*.jsonl"), f"{folder}/2.txt"])
    assert [str(Path(file).relative_to(tmp_path)) for file in found] == ["b/1.py", "b/2.txt", "a/z.jsonl", "b/2.txt"]


def test_an_input_that_names_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--input '.*none' names no file"):
        documents.find_files([str(tmp_path / "none")])


def test_zst_is_unpacked_by_the_program_where_the_package_is_missing_and_refused_without_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "zstd"
    program.write_text("#!/bin/sh\necho unpacked $2\n")
    program.chmod(0o755)
    path = write_packed(tmp_path / "some.jsonl.zst", b"x")
    monkeypatch.setattr(zst, "zstandard", None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert list(documents.lines_of(Piece(path, 0, 1))) == [f"unpacked {path}\n".encode()]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="neither the package zstandard nor the program zstd .* pip install zstandard"):
        documents.find_files([path])


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = "\ufeff".encode()
    assert documents.text_of_line(mark + b'{"text": "a"}', "text") == "a"
    assert list(documents.texts_of(write_packed(tmp_path / "some.txt", mark + b"a"))) == ["a"]


@pytest.mark.parametrize("content", ['[\n {"text": "a"}]', '\ufeff{"text": "a"}\n{"text": "b"}\n'])
@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_documents_in_a_json_file_are_refused_unless_a_folder_is_named(tmp_path: Path, content: str, suffix: str) -> None:
    path = write_packed(tmp_path / f"some{suffix}", content.encode())
    with pytest.raises(UserError, match=r"read from the lines of a \.jsonl file"):
        documents.find_files([str(tmp_path / "*.json*")])
    assert documents.find_files([str(tmp_path)]) == [path]


@pytest.mark.parametrize("content", ['{"a": [{"b": 1}]}', "[1, 2]", '{"a": 1}\n', ""])
def test_other_json_files_are_texts(tmp_path: Path, content: str) -> None:
    path = write_packed(tmp_path / "some.json", content.encode())
    assert documents.find_files([path]) == [path]


def test_parts_hold_all_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "SMALLEST_PART_BYTES", 10)
    sizes = {"a.jsonl": 25, "b.txt": 30, "c.txt": 3, "d.txt": 0, "e.jsonl.gz": 40, "f.jsonl": 4}
    files = []
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
        files.append(str(tmp_path / name))
    parts = documents.cut_into_parts(files)
    pieces = [(Path(piece.path).name, piece.start, piece.stop) for part in parts for piece in part]
    assert pieces == [
        ("a.jsonl", 0, 10),
        ("a.jsonl", 10, 20),
        ("a.jsonl", 20, 25),
        ("b.txt", 0, 30),
        ("c.txt", 0, 3),
        ("d.txt", 0, 0),
        ("e.jsonl.gz", 0, 40),
        ("f.jsonl", 0, 4),
    ]
    assert [len(part) for part in parts] == [1, 1, 2, 3, 1]
