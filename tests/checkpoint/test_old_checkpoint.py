"""A checkpoint that an earlier version wrote goes on as that version went on, in its own layout and in another.

`goldens/step_000000003` and the losses below are from commit 291d2ee, one process, the settings below.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train as entry
from neox_native.config.check import require
from neox_native.config.load import load
from neox_native.data.indexed import IndexedWriter
from tests.ranks import run_ranks

OLD = Path(__file__).parent / "goldens" / "step_000000003"
LOSSES = [3.4688966274261475, 3.3662612438201904, 3.339813470840454]
"""Of steps 4 to 6."""
SETTINGS = [
    "--model.num_layers=2", "--model.hidden_size=8", "--model.num_heads=2", "--model.seq_length=8", "--model.rotary_pct=0.5",
    "--model.vocab_size=30", "--model.vocab_multiple_of=8", "--model.tie_embeddings=true", "--training.steps=6",
    "--lr_schedule.decay_steps=6", "--training.global_batch_size=4", "--training.micro_batch_size=1", "--optimizer.lr=1e-2",
    "--logging.every=1", "--logging.tensorboard=false", "--run.device=cpu",
]  # fmt: skip


@pytest.mark.parametrize(
    "layout",
    [[], ["--parallel.pp=2", "--parallel.tp=2"], ["--parallel.dp=2", "--parallel.zero_stage=3"]],
    ids=["one process", "pp 2 tp 2", "dp 2 zero 3"],
)
def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path: Path, layout: list[str]) -> None:
    with IndexedWriter(str(tmp_path / "corpus"), np.uint16) as writer:
        for number in range(20):
            writer.add_document((np.arange(40 + number) * (1 + number % 3) + number) % 30)
    run = tmp_path / "run"
    shutil.copytree(OLD, run / "checkpoints" / OLD.name)
    config = load(None, [*SETTINGS, *layout, f"--data.train={tmp_path / 'corpus'}", f"--run.dir={run}"])
    world_size = config.parallel.pp * config.parallel.tp * max(config.parallel.dp, 1)
    run_ranks(world_size, lambda: entry.train(require(config, world_size), torch.device("cpu")))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in logged] == [4, 5, 6]
    assert [line["loss"] for line in logged] == pytest.approx(LOSSES, rel=1e-5)
