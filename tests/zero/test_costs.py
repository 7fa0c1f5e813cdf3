"""What is held and what is moved, counted on the real thing and compared with closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from neox_native.zero import collectives
from neox_native.zero.costs import Costs, unit_costs
from neox_native.zero.layout import ZeroStage, lay_out
from neox_native.zero.optimizer import ShardedOptimizer
from neox_native.zero.unit import local
from tests.ranks import run_ranks
from tests.zero.toy import Case, backward, learning_rate, sharded

STAGES = (0, 1, 2, 3)
P = 1600
"""Parameters of a unit that needs no padding on 2 or 4 ranks: [32, 40] and [320]."""
SHAPES = [(32, 40), (320,)]


def cost_of(stage: int, dp: int, param_bytes: int, num_microbatches: int = 1) -> Costs:
    layout = lay_out(SHAPES, dp if stage else 1)
    return unit_costs(
        layout, layout, ZeroStage(stage), dp, 0, param_bytes, num_moments=2, num_microbatches=num_microbatches
    )


@pytest.mark.parametrize("d", [2, 4])
def test_low_precision_holds_what_the_papers_say(d: int) -> None:
    per_parameter = [cost_of(stage, d, param_bytes=2).held / P for stage in STAGES]
    assert per_parameter == [18, 6 + 12 / d, 2 + 16 / d, 18 / d]


@pytest.mark.parametrize("d", [2, 4])
def test_fp32_needs_no_second_copy_of_the_weights(d: int) -> None:
    per_parameter = [cost_of(stage, d, param_bytes=4).held / P for stage in STAGES]
    assert per_parameter == [16, 8 + 8 / d, 4 + 12 / d, 16 / d]


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("d", [2, 4])
def test_fp32_moves_what_the_papers_say(d: int, m: int) -> None:
    elements = [cost_of(stage, d, 4, m).moved / 4 / P * d / (d - 1) for stage in STAGES]
    assert elements == [2, 2, m + 1, 3 * m]


class Counter:
    """Counts the bytes that this rank receives in the collectives of `zero/`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        for name in ("all_gather", "reduce_scatter", "all_reduce"):
            monkeypatch.setattr(collectives, name, self.counting(name, getattr(collectives, name)))

    def counting(self, name: str, original: Any) -> Any:
        """A stand-in for a collective that counts."""

        def counted(first: Tensor, *rest: Any) -> Any:
            group = rest[-1]
            d = dist.get_world_size(group)
            whole = max(tensor.nbytes for tensor in (first, *rest[:-1]))
            received = whole * (d - 1) // d * (2 if name == "all_reduce" else 1)
            self.calls[name] = self.calls.get(name, 0) + 1
            self.bytes[name] = self.bytes.get(name, 0) + received
            return original(first, *rest)

        return counted


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of all distinct storages."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def held_bytes(optimizer: ShardedOptimizer) -> int:
    """Bytes of every storage that outlives a step, found by following all references."""
    found: list[Tensor] = []
    for stage in optimizer.stages.values():
        for weights, bucket in zip(stage.weights, stage.buckets):
            found += [local(spec.parameter).data for spec in weights.specs]
            for owner in (weights, bucket):
                for value in vars(owner).values():
                    found += [
                        each for each in (value if isinstance(value, list) else [value]) if isinstance(each, Tensor)
                    ]
    found += [value for state in optimizer.optimizer.state.values() for value in state.values() if value.dim()]
    return storage_bytes([tensor for tensor in found if tensor.untyped_storage().nbytes()])


def measure(case: Case, dp: int) -> tuple[Costs, dict[str, int], dict[str, int], int, int]:
    """Train two steps; expected costs, calls and bytes of the second, bytes held after either."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        counter = Counter(monkeypatch)
        model, optimizer = sharded(case, dp)
        held = []
        for step in range(2):
            counter.calls.clear()
            counter.bytes.clear()
            backward(model, optimizer, case, step, dp)
            optimizer.step(learning_rate(case), case.clip)
            held.append(held_bytes(optimizer))
        return optimizer.costs(case.accumulation), counter.calls, counter.bytes, held[0], held[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dp", [2, 4])
def test_a_run_holds_and_moves_what_the_closed_forms_say(dp: int, dtype: torch.dtype) -> None:
    base = Case(optimizer="adamw", dtype=dtype, frozen=("blocks.1.up.weight",))
    cases = [replace(base, stage=stage) for stage in STAGES]
    for costs, _calls, moved, first, second in sum(run_ranks(dp, lambda: [measure(case, dp) for case in cases]), []):
        assert sum(moved.values()) == costs.moved
        assert moved.get("all_gather", 0) == costs.gathered
        assert first == second == costs.held


@pytest.mark.parametrize("m", [1, 2])
def test_one_collective_per_unit(m: int) -> None:
    cases = [Case(stage=stage, accumulation=m) for stage in STAGES]
    calls = [result[1] for result in run_ranks(2, lambda: [measure(case, 2) for case in cases])[0]]
    units = 5  # embedding, three blocks, head
    assert calls == [
        {"all_reduce": units},
        {"all_gather": units, "reduce_scatter": units},
        {"all_gather": units, "reduce_scatter": m * units},
        {"all_gather": 2 * m * units, "reduce_scatter": m * units},
    ]


def test_padding_is_what_separates_a_run_from_the_papers() -> None:
    """The sizes of the toy divide by nothing; its rows are longer than P / d by less than a slot's padding each."""
    costs = run_ranks(4, measure, Case(stage=3, dtype=torch.bfloat16, optimizer="adamw"), 4)[0][0]
    shapes = [(13, 10), *3 * [(10,), (10,), (22, 10), (22,), (10, 22), (10,)], (10,), (10,), (13, 10)]
    exact = 18 / 4 * sum(math.prod(shape) for shape in shapes)
    padding = sum(16 + math.prod(shape[1:]) for shape in shapes) * 18
    assert exact <= costs.held < exact + padding
