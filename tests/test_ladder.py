"""configs/ladder climbs from one process to three axes; every rung draws the serial loss curve."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

import train as entry
from neox_native.config.check import require
from neox_native.config.load import load
from tests.ranks import run_ranks

LADDER = Path(__file__).parents[1] / "configs" / "ladder"
RUNGS = sorted(path.stem for path in LADDER.glob("*.toml"))
SHORT = [
    "--training.steps=3", "--training.global_batch_size=8", "--training.micro_batch_size=2", "--model.seq_length=32",
    "--logging.every=1", "--logging.tensorboard=false", "--evaluation.every=0", "--run.device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """Rung -> its losses and batch hashes."""

    @cache
    def curve(rung: str) -> list[tuple[float, str]]:
        folder = tmp_path_factory.mktemp(rung)
        config = load(LADDER / f"{rung}.toml", [*SHORT, f"--run.dir={folder}"])
        world_size = config.parallel.pp * config.parallel.dp * config.parallel.tp
        run_ranks(world_size, lambda: entry.train(require(config, world_size), torch.device("cpu")))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["loss"], line["batch_hash"]) for line in lines]

    return curve


def test_the_ladder_has_its_seven_rungs():
    assert RUNGS == ["1_serial", "2_data", "3_zero1", "4_zero3", "5_tensor", "6_pipeline", "7_three_d"]


@pytest.mark.parametrize("rung", RUNGS[1:])
def test_a_rung_draws_the_serial_curve(draw, rung):
    for (loss, digest), (serial_loss, serial_digest) in zip(draw(rung), draw(RUNGS[0]), strict=True):
        assert loss == pytest.approx(serial_loss, rel=1e-5) and digest == serial_digest
