"""One part of a preparation: documents encoded into token files, and a report of what became of them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from neox_native.data.indexed import IGNORED, IndexedWriter, token_dtype
from neox_native.data.preparation import documents
from neox_native.data.preparation.documents import BadLine, Piece
from neox_native.data.tokenizers import load_tokenizer
from neox_native.durable import write_whole

EMPTY = "empty"
"""Reason for leaving out a document without text, the only one that is no fault."""
NAMED_LINES = 5
"""Lines named for each piece and reason."""
LABELS_SUFFIX = "_labels"
"""Labels of PREFIX lie in PREFIX_labels."""
load_tokenizer_once = cache(load_tokenizer)


@dataclass(frozen=True)
class Recipe:
    """What decides the tokens of a document."""

    tokenizer: str = "byte"
    text_key: str = "text"
    """Key of a .jsonl line that holds the document."""
    append_eod: bool = False
    """End every document with the tokenizer's end-of-document token."""
    allow_special: bool = False
    """Give a text that spells a special token that token's id."""
    prompt: str = ""
    """Template over the keys of a line: with it a line is a prompt and a response, and label files are written too."""
    response_key: str = "response"
    """Key of the response, which alone is to be predicted."""
    max_line_bytes: int = documents.LONGEST_LINE_BYTES
    """A longer line of a .jsonl file is faulty [bytes]."""


@dataclass
class PieceReport:
    """What became of one piece."""

    path: str
    lines: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Documents left out, by reason."""
    examples: dict[str, list[int]] = field(default_factory=dict)
    """Their first lines, counted from 1 at the start of the piece."""

    def drop(self, reason: str) -> None:
        """Counts the line read last."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if self.dropped[reason] <= NAMED_LINES:
            self.examples.setdefault(reason, []).append(self.lines)


@dataclass
class Report:
    """What was read and written."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    pieces: list[PieceReport] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Adds up the counts; the pieces follow those of this report."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes
        self.pieces += other.pieces

    @classmethod
    def of(cls, content: dict[str, Any]) -> Report:
        """The report that `asdict` took apart."""
        return cls(**{**content, "pieces": [PieceReport(**piece) for piece in content["pieces"]]})

    def bad_share(self) -> float:
        """Faulty documents in proportion to all that were read."""
        faults = sum(count for piece in self.pieces for reason, count in piece.dropped.items() if reason != EMPTY)
        return faults / max(1, sum(piece.lines for piece in self.pieces))

    def dropped(self) -> list[str]:
        """For each file and reason a sentence with the count and the first line numbers."""
        lines_before: dict[str, int] = {}
        found: dict[tuple[str, str], tuple[int, list[int]]] = {}
        for piece in self.pieces:
            before = lines_before.setdefault(piece.path, 0)
            for reason, count in piece.dropped.items():
                total, lines = found.get((piece.path, reason), (0, []))
                found[piece.path, reason] = total + count, lines + [before + line for line in piece.examples[reason]]
            lines_before[piece.path] += piece.lines
        sentences = []
        for (path, reason), (count, lines) in found.items():
            where = ""
            if documents.is_jsonl(path):
                where = f" (line {', '.join(map(str, lines[:NAMED_LINES]))}{', ...' if count > NAMED_LINES else ''})"
            sentences.append(f"{path}: {count:,} dropped, {reason}{where}")
        return sentences


class PartWriter:
    """Encodes documents into the token file of a part and, for prompts and responses, its label file."""

    def __init__(self, recipe: Recipe, prefix: Path, stack: ExitStack) -> None:
        self.recipe, self.tokenizer = recipe, load_tokenizer_once(recipe.tokenizer)
        dtype = token_dtype(self.tokenizer.vocab_size)
        self.tokens = stack.enter_context(IndexedWriter(prefix, dtype))
        labels = IndexedWriter(f"{prefix}{LABELS_SUFFIX}", np.int32)
        self.labels = stack.enter_context(labels) if recipe.prompt else None
        self.end = np.array([self.tokenizer.eod_id] if recipe.append_eod else [], np.uint32)
        self.report = Report()

    def _add(self, *texts: str) -> None:
        """Texts of the open document; of several, only the last is to be predicted."""
        parts = [self.tokenizer.encode(text, self.recipe.allow_special) for text in texts]
        ids = np.concatenate(parts)
        self.tokens.add(ids)
        if self.labels:
            labels = ids.astype(np.int32)
            labels[: len(ids) - len(parts[-1])] = IGNORED
            self.labels.add(labels)
        self.report.text_bytes += sum(len(text.encode()) for text in texts)

    def _end(self) -> None:
        for writer in (self.tokens, self.labels):
            if writer:
                writer.add(self.end)
                writer.end_document()
        self.report.documents += 1

    def add_line(self, line: bytes) -> None:
        """The document of a .jsonl line. Raises `BadLine`."""
        if len(line) > self.recipe.max_line_bytes:
            raise BadLine(f"longer than {self.recipe.max_line_bytes:,} bytes")
        texts: tuple[str, ...]
        if self.recipe.prompt:
            texts = documents.prompt_and_response(line, self.recipe.prompt, self.recipe.response_key)
        else:
            texts = (documents.text_of_line(line, self.recipe.text_key),)
        if not texts[-1]:
            raise BadLine(EMPTY)
        self._add(*texts)
        self._end()

    def add_file(self, path: str) -> None:
        """A whole file as one document. Raises `BadLine`."""
        before, text_bytes = self.tokens.num_tokens, self.report.text_bytes
        try:
            for text in documents.texts_of(path):
                self._add(text)
            if self.tokens.num_tokens == before:
                raise BadLine(EMPTY)
        except BadLine:
            self.tokens.discard_document()
            self.report.text_bytes = text_bytes
            raise
        self._end()


def prepare_part(pieces: list[Piece], recipe: Recipe, prefix: Path) -> Report:
    """Writes one part and, when it is complete, its report beside it."""
    with ExitStack() as stack:
        writer = PartWriter(recipe, prefix, stack)
        for piece in pieces:
            found = PieceReport(piece.path)
            writer.report.pieces.append(found)
            whole = not documents.is_jsonl(piece.path)
            for line in [None] if whole else documents.lines_of(piece, recipe.max_line_bytes):
                found.lines += 1
                if line is not None and not line.strip():
                    continue
                try:
                    writer.add_file(piece.path) if line is None else writer.add_line(line)
                except BadLine as error:
                    found.drop(str(error))
        writer.report.tokens = writer.tokens.num_tokens
    write_json(prefix.with_suffix(".json"), asdict(writer.report))
    return writer.report


def write_json(path: Path, content: object) -> None:
    """Complete or absent, like all files here."""
    write_whole(path, json.dumps(content).encode())
