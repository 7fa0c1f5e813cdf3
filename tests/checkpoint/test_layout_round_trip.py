"""A checkpoint of one layout continues in others, and the next losses are the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from neox_native.interop.checkpoints import CheckpointReader
from tests.checkpoint.small_runs import curve, run, settings, write_corpus

FAST = "--run.determinism=fast"
# Parts over tp that are no even cut: an odd vocabulary, and a key-value head that both ranks have.
UNEVEN = ["--model.vocab_size=61", "--model.vocab_multiple_of=1", "--model.num_kv_heads=1"]
FROM = ["--parallel.pp=2", "--parallel.dp=2", "--parallel.tp=2", "--parallel.zero_stage=1"]
TO = {
    "4 data ranks, ZeRO-3": ["--parallel.dp=4", "--parallel.zero_stage=3"],
    "2 tensor ranks, ZeRO-0": ["--parallel.dp=1", "--parallel.tp=2"],
    "one process": ["--parallel.dp=1"],
}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[tuple]]:
    """The corpus, the folder and the curve of a run of 12 steps on 8 ranks that saved at 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("first")
    corpus = write_corpus(folder)
    run(settings(corpus, folder / "run", FAST, *UNEVEN, *FROM, "--checkpoint.async=true", "--checkpoint.export=bf16"))
    return corpus, folder / "run", curve(folder / "run")


@pytest.mark.parametrize("layout", TO)
def test_next_losses_are_the_same_in_another_layout(
    first: tuple[str, Path, list[tuple]], layout: str, tmp_path: Path
) -> None:
    corpus, folder, expected = first
    shutil.copytree(folder, tmp_path / "run")
    for later in ("step_000000008", "step_000000012"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / later)
    run(settings(corpus, tmp_path / "run", FAST, *UNEVEN, *TO[layout]))
    found = curve(tmp_path / "run")
    assert [line[3:] for line in found] == [line[3:] for line in expected]
    for mine, theirs in zip(found[4:], expected[4:], strict=True):
        assert mine[1] == pytest.approx(theirs[1], rel=1e-5)


def test_published_weights_are_those_of_the_last_step(first: tuple[str, Path, list[tuple]]) -> None:
    _, folder, _ = first
    published, last = CheckpointReader(folder / "weights"), CheckpointReader(folder / "checkpoints" / "step_000000012")
    assert last.shapes["layers.3.attention.query_key_value.weight"] == (6 * 8, 32)
    for name in last.shapes:
        assert torch.equal(published(name), last(name).bfloat16().float()), name


def test_another_global_batch_goes_on_where_the_samples_were(
    first: tuple[str, Path, list[tuple]], tmp_path: Path
) -> None:
    corpus, folder, expected = first
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000000012")
    run(settings(corpus, tmp_path / "run", FAST, *UNEVEN, "--parallel.dp=1", "--training.global_batch_size=16"))
    found = curve(tmp_path / "run")
    assert found[:8] == expected[:8]
    assert [line[5] for line in found[8:]] == [8 * 8 + 16 * more for more in (1, 2, 3, 4)]
