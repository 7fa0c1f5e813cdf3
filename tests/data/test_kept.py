"""Orders that are kept on disk are those that were drawn."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from neox_native.config.schema import Data, Evaluation, Model, Training
from neox_native.data import order
from neox_native.data.build import build_data
from neox_native.data.indexed import IndexedWriter
from neox_native.data.kept import kept
from neox_native.data.order import Corpus, NeoxOrder
from neox_native.launch import Ranks

FACTS = {"seed": 1, "documents": (0, 5)}


def numbers() -> dict[str, np.ndarray]:
    return {"documents": np.arange(5, dtype=np.int32), "ends": np.arange(5) * 2}


def never() -> dict[str, np.ndarray]:
    raise AssertionError("drawn again")


def test_what_was_drawn_once_is_read_by_later_runs(tmp_path: Path) -> None:
    kept(tmp_path / "orders", FACTS, numbers)
    found = kept(tmp_path / "orders", dict(reversed(FACTS.items())), never)
    assert found.keys() == numbers().keys()
    assert all(
        np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in numbers().items()
    )
    with pytest.raises(AssertionError, match="drawn again"):
        kept(tmp_path / "orders", FACTS | {"seed": 2}, never)


def test_of_many_who_ask_at_once_one_draws(tmp_path: Path) -> None:
    drawn = []

    def draw() -> dict[str, np.ndarray]:
        drawn.append(1)
        return numbers()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: kept(tmp_path, FACTS, draw), range(8)))
    assert len(drawn) == 1 and all(np.array_equal(each["ends"], numbers()["ends"]) for each in found)


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "orders").write_text("a file")
    assert np.array_equal(kept(tmp_path / "orders", FACTS, numbers)["ends"], numbers()["ends"])


def test_a_write_that_fails_leaves_no_order_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(np, "save", full)
    assert np.array_equal(kept(tmp_path, FACTS, numbers)["ends"], numbers()["ends"])
    assert not list(tmp_path.iterdir())


def corpus_of(num_documents: int, tokens: int) -> Corpus:
    return Corpus(range(num_documents), np.full(num_documents, tokens, np.int32), 4, "packed", None)


@pytest.mark.parametrize("fails_at", [1, 3])
def test_an_order_that_cannot_be_written_is_the_one_that_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    written, save = [], np.save

    def fills_up(file: object, array: np.ndarray) -> None:
        written.append(array)
        if len(written) >= fails_at:
            raise OSError("no space left")
        save(file, array)

    drawn = NeoxOrder(corpus_of(30, 7), 100, seed=3)
    monkeypatch.setattr(order, "LONG", 1)
    monkeypatch.setattr(np, "save", fills_up)
    unwritten = NeoxOrder(corpus_of(30, 7), 100, seed=3, keep=partial(kept, tmp_path))
    assert len(written) == fails_at
    assert np.array_equal(unwritten.shuffle, drawn.shuffle)
    assert [unwritten.segments(n) for n in range(100)] == [drawn.segments(n) for n in range(100)]


def test_drawing_twice_is_drawing_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(_facts: dict[str, object], draw: order.Draw) -> dict[str, np.ndarray]:
        draw()
        return draw()

    monkeypatch.setattr(order, "LONG", 1)
    once, again = NeoxOrder(corpus_of(30, 7), 100, seed=3), NeoxOrder(corpus_of(30, 7), 100, seed=3, keep=twice)
    assert np.array_equal(once.shuffle, again.shuffle) and once.segments(0) == again.segments(0)


@pytest.mark.parametrize("num_documents, tokens", [(1000, 3), (10, 4000)], ids=["documents", "samples"])
def test_an_order_is_kept_if_its_documents_or_its_samples_are_many(
    monkeypatch: pytest.MonkeyPatch, num_documents: int, tokens: int
) -> None:
    asked = []

    def keep(facts: dict[str, object], draw: order.Draw) -> dict[str, np.ndarray]:
        asked.append(facts)
        return draw()

    monkeypatch.setattr(order, "LONG", 1000)
    NeoxOrder(corpus_of(num_documents, tokens), 1, seed=3, keep=keep)
    NeoxOrder(corpus_of(10, 40), 1, seed=3, keep=keep)
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["documents.npy", "ends.npy", "names.json"])
@pytest.mark.parametrize("left", [None, 0, 0.9])
def test_a_damaged_order_is_written_anew(tmp_path: Path, name: str, left: float | None) -> None:
    kept(tmp_path, FACTS, numbers)
    (path,) = tmp_path.glob(f"*/{name}")
    whole = path.read_bytes()
    path.unlink() if left is None else path.write_bytes(whole[: int(left * len(whole))])
    assert np.array_equal(kept(tmp_path, FACTS, numbers)["ends"], numbers()["ends"])
    assert path.read_bytes() == whole
    assert kept(tmp_path, FACTS, never).keys() == numbers().keys()


def test_others_may_read_what_one_user_kept(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        kept(tmp_path, FACTS, numbers)
    finally:
        os.umask(before)
    (place,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o644}
    assert place.stat().st_mode & 0o777 == 0o755


def test_an_order_is_read_without_its_lock(tmp_path: Path) -> None:
    kept(tmp_path, FACTS, numbers)
    (place,) = tmp_path.iterdir()
    (tmp_path / f"{place.name}.lock").mkdir()
    assert kept(tmp_path, FACTS, never).keys() == numbers().keys()


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    kept(tmp_path, FACTS, numbers)
    (place,) = (path for path in tmp_path.iterdir() if path.is_dir())
    others = tmp_path / "neox-another.tmp-1"
    for leftover in (place.with_name(f"{place.name}.tmp-1"), others):
        leftover.mkdir()
        (leftover / "ends.part").write_text("half")
    shutil.rmtree(place)
    kept(tmp_path, FACTS, numbers)
    assert {path.name for path in tmp_path.iterdir()} == {place.name, others.name}


def test_a_run_reads_the_same_samples_from_a_kept_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.RandomState(0)
    with IndexedWriter(tmp_path / "corpus", np.uint16) as writer:
        for _ in range(40):
            writer.add_document(draw.randint(0, 50, draw.randint(1, 30)))
    data = Data(train=str(tmp_path / "corpus"), split="1", cache_dir=str(tmp_path / "cache"))
    model, training = Model(seq_length=8, vocab_size=50), Training(global_batch_size=4, steps=60)
    build = partial(build_data, data, model, training, Evaluation(every=0), 3, Ranks())
    drawn = build().train
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(order, "LONG", 1)
    for _ in range(2):
        from_disk = build().train
        assert from_disk.num_samples == drawn.num_samples and from_disk.fingerprint() == drawn.fingerprint()
        assert all(np.array_equal(from_disk.sample(n), drawn.sample(n)) for n in range(drawn.num_samples))
    assert len(list((tmp_path / "cache" / "orders").glob("*/*.npy"))) == 3
