"""What a user sees: train.py as a command, alone and under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from neox_native.data.indexed import IndexedWriter

ROOT = Path(__file__).parents[1]
SMALL = [
    "--config", "configs/quickstart.toml", "--training.steps=2", "--training.global_batch_size=4",
    "--training.micro_batch_size=1", "--model.seq_length=32", "--logging.every=1", "--logging.tensorboard=false",
    "--evaluation.every=0",
]  # fmt: skip


def write_corpus(prefix: Path, documents: list[np.ndarray]) -> str:
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def command(*arguments: str, ranks: int = 0, away_in: Path | None = None) -> subprocess.CompletedProcess:
    """`train.py`, or what an installed package has instead of it, in another folder."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    program = ["-m", "neox_native.train"] if away_in else ["train.py"]
    return subprocess.run(
        [sys.executable, *launcher, *program, *SMALL, *arguments],
        cwd=away_in or ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--modle.num_heads=8"], "modle"),
        (["--parallel.tp=2"], "torchrun"),
        (["--data.train=nowhere/corpus"], "nowhere/corpus"),
    ],
    ids=["unknown section", "world size", "missing data"],
)
def test_a_mistake_gets_a_sentence_and_status_1(tmp_path, arguments, sentence):
    done = command(f"--run.dir={tmp_path / 'run'}", *arguments)
    assert done.returncode == 1
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_failure_on_one_rank_ends_the_job_with_its_error_first(tmp_path):
    documents = [np.full(33, 7) for _ in range(30)]
    prefix = write_corpus(tmp_path / "corpus", documents)
    tokens = np.memmap(f"{prefix}.bin", np.uint16, mode="r+")
    tokens[33 * 10] = 300  # one bad token: it lies in one rank's rows
    tokens.flush()
    data = [f"--data.train={prefix}", "--data.split=1,0,0"]
    done = command(*data, f"--run.dir={tmp_path / 'run'}", "--training.steps=20", ranks=2, away_in=tmp_path)
    assert done.returncode == 1
    first = next(line for line in done.stderr.splitlines() if "rror" in line and "OMP_NUM_THREADS" not in line)
    assert "token id 300" in first and "model.vocab_size = 257" in first
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, "one rank says it for all of them"
    assert any("traceback : " in line and "token id 300" in line for line in done.stderr.splitlines()), "torchrun was not told"


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, layout",
    [
        (8, ["--parallel.pp=2", "--parallel.dp=2", "--parallel.tp=2"]),
        (4, ["--parallel.tp=2", "--parallel.zero_stage=3"]),
    ],
    ids=["three axes", "ZeRO-3 and tp"],
)
def test_layouts_from_the_command_line_log_the_losses_of_one_process(tmp_path, ranks, layout):
    losses = []
    for ranks, layout in (0, []), (ranks, layout):
        folder = tmp_path / str(ranks)
        done = command(f"--run.dir={folder}", *layout, "--training.global_batch_size=8", ranks=ranks)
        assert done.returncode == 0, done.stderr
        losses.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
