"""`run.determinism = "elastic"`: losses, norms, gradients and weights of three steps, bit by bit those of one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import pytest
import torch
from torch.torch_version import TorchVersion

from neox_native.config.check import require
from neox_native.config.layout_rules import ZERO_BUBBLE
from neox_native.config.schema import Config, Parallel
from neox_native.engine.build import SUMS_PARTS_LATE
from tests.ranks import run_ranks
from tests.train.runs import Shards, config_of, train, whole

VIRTUAL = Parallel(pp=2, dp=1, virtual_stages=2)
LAYOUTS = {
    "dp 4, ZeRO-0": Parallel(dp=4),
    "dp 2, ZeRO-1": Parallel(dp=2, zero_stage=1),
    "dp 4, ZeRO-2": Parallel(dp=4, zero_stage=2),
    "dp 4, ZeRO-3": Parallel(dp=4, zero_stage=3),
    "dp 4, ZeRO-3 in pairs": Parallel(dp=4, zero_stage=3, zero_shard_size=2),
    "pp 2 x dp 4, ZeRO-1 in pairs": Parallel(pp=2, dp=4, zero_stage=1, zero_shard_size=2),
    "tp 2, dp 4, ZeRO-2 in pairs": Parallel(dp=4, tp=2, zero_stage=2, zero_shard_size=2, sequence_parallel=True),
    "pp 2 x dp 2, ZeRO-1": Parallel(pp=2, dp=2, zero_stage=1),
    "pp 2 x dp 2, ZeRO-3": Parallel(pp=2, dp=2, zero_stage=3),
    "uneven stages": Parallel(pp=2, dp=1, stage_layers=[1, 3]),
    "gpipe": Parallel(pp=4, dp=1, pipeline_schedule="gpipe"),
    "interleaved": replace(VIRTUAL, pipeline_schedule="interleaved_1f1b"),
    "looped bfs": replace(VIRTUAL, dp=2, pipeline_schedule="looped_bfs", zero_stage=1),
    "interleaved zero bubble": replace(VIRTUAL, pipeline_schedule="interleaved_zero_bubble"),
    "zbv": replace(VIRTUAL, pipeline_schedule="zbv"),
    "tp 2, dp 2": Parallel(dp=2, tp=2, sequence_parallel=True, zero_stage=3),
    "tp 4, dp 2": Parallel(dp=2, tp=4, zero_stage=1),
    "tp 2, zbv": replace(VIRTUAL, tp=2, sequence_parallel=True, pipeline_schedule="zbv"),
}
SETTINGS = {
    "fp32": {"model": "sequential"},
    "sgd": {"optimizer": "sgd", "micro_batch_size": 2, "global_batch_size": 16},
    "bf16, tied": {"model": "odd tied", "precision": "bf16"},
    "fp16": {"precision": "fp16", "initial_loss_scale": 2.0**12, "model": "one key head"},
    "fp16, tied": {"precision": "fp16", "initial_loss_scale": 2.0**12, "global_batch_size": 12, "model": "tied"},
    "selective": {"activation_checkpointing": "selective", "recompute_every": 2, "precision": "bf16"},
    "recomputed": {"activation_checkpointing": "full", "model": "grouped odd tied"},
}
FAST = [
    ("dp 4, ZeRO-0", "fp16, tied"),
    ("dp 4, ZeRO-2", "recomputed"),
    ("dp 4, ZeRO-3 in pairs", "bf16, tied"),
    ("pp 2 x dp 2, ZeRO-1", "fp32"),
    ("zbv", "selective"),
    ("tp 4, dp 2", "fp32"),
]


@dataclass(frozen=True)
class Alone:
    """What one process of a tensor-parallel degree computes."""

    tp: int
    sequence_parallel: bool
    settings: str


def numbers(parallel: Parallel, settings: str) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, norms and the evaluation; gradients of the first step; last weights."""
    ranks = parallel.pp * parallel.dp * parallel.tp
    config: Config = config_of(parallel, **{"optimizer": "adamw", **SETTINGS[settings]})
    config = require(replace(config, run=replace(config.run, determinism="elastic")), ranks)
    outcomes = run_ranks(ranks, train, config, True)
    found = [*outcomes[0].losses, *outcomes[0].norms, outcomes[0].evaluation]

    def gathered(parts: list[Shards]) -> dict[str, torch.Tensor]:
        return whole(parts, parallel.shard_ranks, exact=True)

    return found, gathered([each.gradients for each in outcomes]), gathered([each.weights for each in outcomes])


@cache
def alone(twin: Alone) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return numbers(Parallel(dp=1, tp=twin.tp, sequence_parallel=twin.sequence_parallel), twin.settings)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow) for pair in product(LAYOUTS, SETTINGS)],
)
def test_every_layout_has_the_bits_of_one_process(layout: str, settings: str) -> None:
    parallel = LAYOUTS[layout]
    if parallel.tp > 1 and parallel.pipeline_schedule in ZERO_BUBBLE and TorchVersion(torch.__version__) < SUMS_PARTS_LATE:
        pytest.skip("refused, see `require_possible`")
    expected = alone(Alone(parallel.tp, parallel.sequence_parallel, settings))
    found = numbers(parallel, settings)
    assert found[0] == expected[0]
    for mine, its in zip(found[1:], expected[1:]):
        assert mine.keys() == its.keys()
        assert [name for name in its if not torch.equal(mine[name], its[name])] == []
