"""The rule about microbatches says no exactly where torch's schedules do."""

from __future__ import annotations

import itertools

import pytest
from torch.distributed.pipelining.schedules import get_schedule_class

from neox_native.config.check import problems
from neox_native.config.layout_rules import LOOPED
from neox_native.config.load import CONFIGS_FOLDER, load


class Stage:
    """As much of a PipelineStage as a schedule's constructor looks at."""

    submod = None
    has_backward = True

    def __init__(self, index: int, group_size: int, num_stages: int) -> None:
        self.stage_index, self.num_stages, self.group_size, self.group_rank = index, num_stages, group_size, 0
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        self.stage_index_to_group_rank = {stage: stage % group_size for stage in range(num_stages)}


def torch_takes(schedule: str, pp: int, virtual: int, microbatches: int) -> bool:
    name = {
        "gpipe": "GPipe",
        "1f1b": "1F1B",
        "interleaved_1f1b": "Interleaved1F1B",
        "looped_bfs": "LoopedBFS",
        "interleaved_zero_bubble": "InterleavedZeroBubble",
        "zbv": "ZBVZeroBubble",
    }[schedule]
    indices = [0, 2 * pp - 1] if schedule == "zbv" else [local * pp for local in range(virtual)]
    stages = [Stage(index, pp, pp * virtual) for index in indices]
    try:
        get_schedule_class(name)(stages[0] if virtual == 1 and name in ("GPipe", "1F1B") else stages, microbatches)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "schedule, virtual", [("gpipe", 1), ("1f1b", 1), ("zbv", 2), *itertools.product(LOOPED, (2,))]
)
def test_microbatch_rule_agrees_with_torch(schedule: str, virtual: int) -> None:
    for pp, microbatches in itertools.product((2, 3, 4), range(1, 14)):
        config = load(
            CONFIGS_FOLDER / "quickstart.toml",
            [
                f"--parallel.pp={pp}",
                f"--parallel.pipeline_schedule={schedule}",
                f"--parallel.virtual_stages={virtual}",
                "--model.num_layers=8",
                f"--training.global_batch_size={microbatches}",
                "--training.micro_batch_size=1",
            ],
        )
        assert (problems(config, pp) == []) == torch_takes(schedule, pp, virtual, microbatches), (pp, microbatches)
