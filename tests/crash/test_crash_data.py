"""Preparation, the built-in corpus, kept orders and conversion at each of their crash points: the same command again gives
the same files, and nothing else is left."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neox_native.config.schema import Model
from neox_native.data.indexed import IndexedWriter
from neox_native.data.kept import kept
from neox_native.data.preparation import builtin, documents, prepare
from neox_native.data.tokenizers import load_tokenizer
from neox_native.errors import UserError
from neox_native.launch import Ranks
from tests.crash import disk
from tests.crash.trials import Work, count, differences
from tests.interop.models import checkpoint
from tools import convert, prepare_data

TINY = Model(num_layers=1, hidden_size=8, num_heads=2, rotary_pct=1.0, seq_length=8, vocab_size=257, vocab_multiple_of=1)


class Here(Executor):
    """Runs in this process what the pool's workers would, where it is recorded."""

    def __init__(self, *_: Any) -> None: ...

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)
        return future


def preparation(inputs: Path, out: Path) -> Callable[[], object]:
    for number in range(3):
        lines = [{"text": f"line {number} {line}", "q": "why?", "response": "so"} for line in range(3)]
        (inputs / f"{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--prompt", "{q} ", "--append-eod", "--output", str(out / "deep" / "text")]
    return lambda: prepare_data.main(["--input", str(inputs), *options])


def merge(inputs: Path, out: Path) -> Callable[[], object]:
    for name in "ab":
        with IndexedWriter(inputs / name, np.uint16) as writer:
            writer.add_document(np.arange(9))
    return lambda: prepare_data.main(["--merge", str(inputs / "a"), str(inputs / "b"), "--output", str(out / "ab")])


def corpus(_: Path, out: Path) -> Callable[[], object]:
    tokenizer = load_tokenizer("byte")
    return lambda: builtin.prepare_python_stdlib(tokenizer, str(out / "cache"), Ranks())


def order(_: Path, out: Path) -> Callable[[], object]:
    drawn = {"documents": np.arange(40), "shuffle": np.arange(30)[::-1].copy()}

    def ask() -> None:
        found = kept(out / "orders", {"seed": 1}, lambda: drawn)
        assert found.keys() == drawn.keys() and all(np.array_equal(found[name], drawn[name]) for name in drawn)

    return ask


def to_hf(inputs: Path, out: Path) -> Callable[[], object]:
    source = checkpoint(inputs / "ours", TINY, tokenizer="byte")
    return lambda: convert.main(["to-hf", str(source), str(out / "deep" / "hf"), "--shard-gb", "4e-6"])


def from_hf(inputs: Path, out: Path) -> Callable[[], object]:
    source = checkpoint(inputs / "ours", TINY, tokenizer="byte")
    convert.main(["to-hf", str(source), str(inputs / "hf")])
    return lambda: convert.main(["from-hf", str(inputs / "hf"), str(out / "deep" / "ours")])


def quietly(command: Callable[[], object]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        command()


def work(folder: Path, make: Callable[[Path, Path], Callable[[], object]]) -> Work:
    inputs, root = folder / "inputs", folder / "root"
    inputs.mkdir()
    root.mkdir()
    command = make(inputs, root)

    def again(_: list[disk.Op]) -> None:
        try:
            quietly(command)
        except UserError as error:
            assert "exists already" in str(error), error
        assert not (wrong := list(differences(disk.Disk.read(root).tree(), expected))), wrong

    tried = Work(root, lambda _: quietly(command), again)
    quietly(command)
    expected = disk.Disk.read(root).tree()
    return tried


WORKS = (preparation, merge, corpus, order, to_hf, from_hf)


def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any], kind: str, sample: int | None) -> int:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(documents, "SMALLEST_PART_BYTES", 100)
    monkeypatch.setattr(builtin, "stdlib_sources", lambda: [Path("this.py"), Path("antigravity.py")])
    attempt = work(tmp_path, make)
    number = getattr(attempt, kind)(sample)
    assert not attempt.wrong, f"{len(attempt.wrong)} of {number}:\n" + "\n".join(attempt.wrong[:12])
    return number


@pytest.mark.parametrize("kind", ["crash", "refuse"])
@pytest.mark.parametrize("make", WORKS)
def test_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any], kind: str) -> None:
    assert tried(tmp_path, monkeypatch, make, kind, 25) > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["crash", "refuse"])
@pytest.mark.parametrize("make", WORKS)
def test_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any], kind: str) -> None:
    count(kind, tried(tmp_path, monkeypatch, make, kind, None))
