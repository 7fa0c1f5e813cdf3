"""The built-in corpus: prepared once by one rank, never stale, never half there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from neox_native.config.schema import Data, Evaluation, Model, Training
from neox_native.data.build import Datasets, build_data
from neox_native.data.indexed import IndexedDataset
from neox_native.data.preparation import builtin
from neox_native.data.tokenizers import byte_tokenizer
from neox_native.errors import UserError
from neox_native.launch import Ranks
from tests.ranks import run_ranks


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library in place of the real one."""
    root = tmp_path / "lib"
    (root / "package" / "tests").mkdir(parents=True)
    (root / "b.py").write_text("import a\n")
    (root / "a.py").write_text("print('ä')\n", encoding="utf-8")
    (root / "package" / "c.py").write_text("")
    (root / "package" / "tests" / "skipped.py").write_text("no")
    monkeypatch.setattr(builtin.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def prepare(cache: Path, log: Callable[[str], None] = lambda _: None) -> str:
    return prepare_on(cache, Ranks(log))


def prepare_on(cache: Path, ranks: Ranks) -> str:
    return builtin.prepare_python_stdlib(byte_tokenizer(), str(cache), ranks)


def build(cache: Path, vocab_size: int = 257) -> Datasets:
    data = Data(cache_dir=str(cache), split="1")
    model, training = Model(seq_length=4, vocab_size=vocab_size), Training(global_batch_size=1, steps=1)
    return build_data(data, model, training, Evaluation(every=0), 1, Ranks(lambda _: None))


def test_documents_are_the_sorted_files_each_ended(library: Path, tmp_path: Path) -> None:
    files = IndexedDataset(prepare(tmp_path / "cache"))
    documents = [bytes(files.get(number)[:-1].astype("u1")).decode() for number in range(len(files))]
    assert documents == ["print('ä')\n", "import a\n", ""]
    assert all(files.get(number)[-1] == 256 for number in range(len(files)))


def test_it_is_prepared_once_and_again_when_the_sources_change(library: Path, tmp_path: Path) -> None:
    first = prepare(tmp_path / "cache")
    written = Path(first + ".idx").stat().st_mtime_ns
    messages: list[str] = []
    assert prepare(tmp_path / "cache", log=messages.append) == first
    assert Path(first + ".idx").stat().st_mtime_ns == written
    assert "sha256" in messages[-1] and len(messages) == 1
    (library / "b.py").write_text("import b\n")
    assert prepare(tmp_path / "cache") != first


def test_a_rank_that_does_not_write_finds_the_writers_files(library: Path, tmp_path: Path) -> None:
    cache, second = tmp_path / "cache", Ranks()
    second.rank = 1
    with pytest.raises(UserError, match="data.cache_dir = .*text.idx is missing after the writing rank prepared it"):
        prepare_on(cache, second)
    assert not cache.exists()
    second.barrier = lambda: prepare(cache)  # type: ignore[method-assign,assignment]
    assert IndexedDataset(prepare_on(cache, second))


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_corpus_that_does_not_open_is_prepared_again(library: Path, tmp_path: Path, damage: str) -> None:
    tokens = Path(prepare(tmp_path / "cache") + ".bin")
    whole = tokens.read_bytes()
    tokens.unlink() if damage == "gone" else tokens.write_bytes(whole[:-2])
    prepare(tmp_path / "cache")
    assert tokens.read_bytes() == whole


def test_runs_that_start_on_an_empty_cache_prepare_it_once(library: Path, tmp_path: Path) -> None:
    def start() -> list[str]:
        messages: list[str] = []
        dist.barrier()
        ranks = Ranks(messages.append)
        ranks.rank = 0  # of a run of its own
        IndexedDataset(prepare_on(tmp_path / "cache", ranks))
        return messages

    messages = sum(run_ranks(3, start), [])
    assert sum("preparing 3 files" in message for message in messages) == 1
    assert {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {"text.about.json", "text.bin", "text.idx"}


@pytest.mark.parametrize("place", ["file/cache", "/proc/cache"])
def test_a_cache_that_cannot_be_written_names_the_setting(library: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="data.cache_dir = .* cannot keep builtin:python-stdlib: .*; set it to a folder"):
        prepare(tmp_path / place)


def test_a_corpus_of_an_earlier_version_is_read(library: Path, tmp_path: Path) -> None:
    prefix = prepare(tmp_path / "cache")
    Path(f"{prefix}.about.json").unlink()
    assert prepare(tmp_path / "cache") == prefix and not Path(f"{prefix}.about.json").exists()
    assert build(tmp_path / "cache").train.num_samples > 0


def test_progress_is_shown(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "PROGRESS_SECONDS", 0.0)
    messages: list[str] = []
    prepare(tmp_path / "cache", log=messages.append)
    assert "B of 21 B" in messages[1] and "24 tokens written" in messages[-2]


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(library: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "cache").train.num_samples > 0
    with pytest.raises(UserError, match="model.vocab_size = 256 is below the 257 ids of data.tokenizer = 'byte'"):
        build(tmp_path / "cache", vocab_size=256)


def test_the_real_library_is_found_without_its_tests() -> None:
    names = {str(path) for path in builtin.stdlib_sources()}
    assert {"argparse.py", "json/decoder.py"} <= names and not any("test" in Path(name).parts for name in names)
