"""Orders that are kept on disk are those that were drawn."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from neox_native.config.schema import Data
from neox_native.data import order
from neox_native.data.build import build_data
from neox_native.data.indexed import IndexedWriter
from neox_native.data.kept import kept

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
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_run_reads_the_same_samples_from_a_kept_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.RandomState(0)
    with IndexedWriter(tmp_path / "corpus", np.uint16) as writer:
        for _ in range(40):
            writer.add_document(draw.randint(0, 50, draw.randint(1, 30)))
    data = Data(train=str(tmp_path / "corpus"), split="1", cache_dir=str(tmp_path / "cache"))
    arguments = {"seq_length": 8, "vocab_size": 50, "seed": 3, "global_batch_size": 4, "steps": 60}
    build = partial(build_data, data, **arguments, eval_every=0, eval_batches=1, is_writer=True, wait=lambda: None)
    drawn = build().train
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(order, "LONG", 1)
    for _ in range(2):
        from_disk = build().train
        assert from_disk.num_samples == drawn.num_samples and from_disk.fingerprint() == drawn.fingerprint()
        assert all(np.array_equal(from_disk.sample(n), drawn.sample(n)) for n in range(drawn.num_samples))
    assert len(list((tmp_path / "cache" / "orders").glob("*/*.npy"))) == 3
