"""The slowest rank is the one that works longest, not one that waits for it."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from neox_native.model.transformer import Transformer
from tests.checkpoint.small_runs import events, run, settings, write_corpus


def slow_down_rank_1() -> None:
    forward = Transformer.forward

    def slower(*arguments, **named):
        time.sleep(0.05)  # the fault itself, not a wait for something
        return forward(*arguments, **named)

    if os.environ["RANK"] == "1":
        Transformer.forward = slower


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_slow_rank_is_named_though_its_peers_wait_for_it(stage: int, tmp_path: Path) -> None:
    changes = ["--training.steps=4", "--logging.stragglers_every=4", "--parallel.dp=2", f"--parallel.zero_stage={stage}"]
    run(settings(write_corpus(tmp_path), tmp_path / "run", *changes), before=slow_down_rank_1)
    (found,) = events(tmp_path / "run", "stragglers")
    rank, slowest, median = re.search(r"rank (\d).* with ([\d.]+) s a step, median ([\d.]+) s", found["message"]).groups()
    assert rank == "1" and float(slowest) > 4 * 0.05 and float(slowest) > 1.2 * float(median), found["message"]
