"""A jsonl of prompts and responses becomes a label-masked dataset, and a pretrained model is fine-tuned on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train as entry
from neox_native.config.check import require
from neox_native.config.load import load
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
SMALL = [
    "--model.num_layers=2", "--model.hidden_size=32", "--model.num_heads=4", "--model.seq_length=32", "--model.vocab_size=257",
    "--model.vocab_multiple_of=2", "--training.steps=10", "--training.global_batch_size=8", "--training.micro_batch_size=2",
    "--optimizer.lr=1e-2", "--logging.every=1", "--logging.tensorboard=false", "--run.device=cpu", "--data.split=1,0,0",
]  # fmt: skip


def run(*settings: str) -> list[dict]:
    config = load(None, [*SMALL, *settings])
    ranks = config.parallel.pp * config.parallel.dp * config.parallel.tp
    run_ranks(ranks, lambda: entry.train(require(config, ranks), torch.device("cpu")))
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """A prefix of prepared questions and answers."""
    folder = tmp_path_factory.mktemp("questions")
    lines = [json.dumps({"question": f"what is {n} plus 1", "answer": "more than before"}) for n in range(200)]
    (folder / "qa.jsonl").write_text("\n".join(lines) + "\n")
    subprocess.run(
        [
            sys.executable, "tools/prepare_data.py", "--input", str(folder / "qa.jsonl"), "--prompt", "Q: {question}? A: ",
            "--response-key", "answer", "--tokenizer", "byte", "--append-eod", "--output", str(folder / "qa"),
        ],
        cwd=ROOT, check=True, capture_output=True, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    return folder / "qa"


def test_only_responses_are_learnt_and_every_layout_learns_the_same(questions, tmp_path):
    run("--parallel.dp=1", f"--data.train={questions}", f"--run.dir={tmp_path / 'base'}", "--training.steps=2")
    start = f"--checkpoint.initialize_from={tmp_path / 'base' / 'checkpoints' / 'step_000000002'}"
    masked = f'--data.train=[{{path = "{questions}", weight = 1.0, labels = "{questions}_labels"}}]'
    one = run("--parallel.dp=1", masked, start, f"--run.dir={tmp_path / 'one'}")
    four = run("--parallel.dp=2", "--parallel.tp=2", masked, start, f"--run.dir={tmp_path / 'four'}")
    assert [line["loss"] for line in four] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    everything = run("--parallel.dp=1", f"--data.train={questions}", start, f"--run.dir={tmp_path / 'all'}")
    # The responses are all alike and soon known by heart; the prompts hold numbers that nobody can guess.
    assert one[-1]["loss"] < everything[-1]["loss"] - 0.1
