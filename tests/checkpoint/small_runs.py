"""Whole runs of a small model on forked ranks, for the tests that break them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import train as entry
from neox_native.config.check import require
from neox_native.config.load import load
from neox_native.config.schema import Config
from neox_native.data.indexed import IndexedWriter
from tests.ranks import run_ranks

SETTINGS = [
    "--model.num_layers=4", "--model.hidden_size=32", "--model.num_heads=4", "--model.seq_length=16",
    "--model.vocab_size=60", "--model.vocab_multiple_of=4", "--training.steps=12", "--training.global_batch_size=8",
    "--training.micro_batch_size=1", "--logging.every=1", "--logging.tensorboard=false", "--run.device=cpu",
    "--run.determinism=bitwise", "--checkpoint.save_every=4",
]  # fmt: skip
CURVE = ("step", "loss", "grad_norm", "batch_hash", "learning_rate", "consumed_samples")


def write_corpus(folder: Path) -> str:
    """A small token file with something to learn; returns its prefix."""
    prefix, draw = str(folder / "corpus"), np.random.RandomState(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(60):
            writer.add_document((draw.randint(60) + np.arange(draw.randint(50, 200))) % 60)
    return prefix


def settings(corpus: str, folder: Path, *changes: str) -> Config:
    """A run in `folder`, not yet checked."""
    return load(None, [*SETTINGS, f"--data.train={corpus}", f"--run.dir={folder}", *changes])


def run(config: Config, before: Callable[[], None] = lambda: None) -> None:
    """Train on as many ranks as the config asks for; each calls `before` first, to arrange a fault."""
    world_size = config.parallel.pp * config.parallel.dp * config.parallel.tp

    def rank() -> None:
        before()
        entry.train(require(config, world_size), torch.device("cpu"))

    run_ranks(world_size, rank)


def curve(folder: Path) -> list[tuple]:
    """What metrics.jsonl says of each step, without what differs from run to run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[name] for name in CURVE) for line in lines]


def events(folder: Path, kind: str) -> list[dict]:
    """The events of a kind, in the order in which they were written."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def saved(folder: Path) -> list[str]:
    """Names in the folder of checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())
