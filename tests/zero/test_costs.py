"""What is held and what is moved, counted on the real thing and compared with the papers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from neox_native.zero import collectives
from neox_native.zero.optimizer import ShardedOptimizer
from neox_native.zero.spec import local
from tests.ranks import run_ranks
from tests.zero import toy
from tests.zero.toy import Case, backward, learning_rate, sharded

STAGES = (0, 1, 2, 3)
FROZEN = "blocks.1.up.weight"


@dataclass(frozen=True)
class Bytes:
    """What one rank holds between steps, and receives in a step's all-gathers and reductions."""

    held: float
    gathered: float
    reduced: float


def by_the_papers(stage: int, d: int, m: int, e: int, trained: int, frozen: int, g: int = 4, ends: int = 0) -> Bytes:
    """Rajbhandari et al. 2020 §5 and §7, with gradients in fp32 or of `g` bytes, and fp32 weights that are their own masters.

    Args:
        stage, d, m: of ZeRO; ranks; microbatches.
        e: bytes of an element of the parameters.
        trained, frozen: elements. Frozen ones have no gradient, no master and no moments.
        ends: elements of the embedding and of the last unit, which stage 3 does not gather for a backward pass.
    """
    masters = 0 if e == 4 else 4
    shares = {0: (1, 1, 1), 1: (1, 1, d), 2: (1, d, d), 3: (d, d, d)}[stage]
    held = trained * sum(size / share for size, share in zip((e, g, masters + 8), shares)) + frozen * e / shares[0]
    gathered = {0: 0, 1: e * trained, 2: e * trained, 3: m * e * (2 * (trained + frozen) - ends)}[stage]
    reduced = g * trained * {0: 2, 1: 1, 2: m, 3: m}[stage]
    return Bytes(held, gathered * (d - 1) / d, reduced * (d - 1) / d)


@pytest.mark.parametrize("d", [2, 4])
def test_the_tables_of_the_papers(d: int) -> None:
    def table(e: int) -> list[float]:
        return [by_the_papers(stage, d, 1, e, 1, 0).held for stage in STAGES]

    assert table(2) == [18, 6 + 12 / d, 2 + 16 / d, 18 / d]
    assert table(4) == [16, 8 + 8 / d, 4 + 12 / d, 16 / d]
    for m in (1, 3):
        moved = [by_the_papers(stage, d, m, 4, 1, 0) for stage in STAGES]
        elements = [(each.gathered + each.reduced) / 4 * d / (d - 1) for each in moved]
        assert elements == [2, 2, m + 1, 3 * m]


class Counter:
    """Counts the bytes that this rank receives in the collectives of `zero/`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: dict[str, int] = {}
        self.order: list[str] = []
        self.bytes: dict[str, int] = {}
        for name in ("all_gather", "exchange_chunks", "reduce_scatter", "all_reduce"):
            kind = name.replace("exchange_chunks", "all_gather")
            monkeypatch.setattr(collectives, name, self.counting(kind, getattr(collectives, name)))

    def counting(self, name: str, original: Any) -> Any:
        """A stand-in for a collective that counts."""

        def counted(first: Tensor | list[Tensor], *rest: Any) -> Any:
            group = rest[-1]
            d = dist.get_world_size(group)
            tensors = [sum(each.nbytes for each in first)] if isinstance(first, list) else [each.nbytes for each in (first, *rest[:-1])]
            whole = max(tensors)
            received = whole * (d - 1) // d * (2 if name == "all_reduce" else 1)
            self.calls[name] = self.calls.get(name, 0) + 1
            self.order.append(name)
            self.bytes[name] = self.bytes.get(name, 0) + received
            return original(first, *rest)

        return counted


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of all distinct storages."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def held_bytes(optimizer: ShardedOptimizer) -> int:
    """Bytes of every storage that outlives a step, found by following all references."""
    found: list[Tensor] = []
    for unit in optimizer.units:
        found += [local(spec.parameter).data for spec in unit.specs]
        for value in [*vars(unit).values(), *vars(unit.gradients).values()]:
            found += [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, Tensor)]
    found += [value for state in optimizer.optimizer.state.values() for value in state.values() if value.dim()]
    return storage_bytes([tensor for tensor in found if tensor.untyped_storage().nbytes()])


def measure(case: Case, dp: int) -> tuple[dict[str, int], dict[str, int], list[int]]:
    """Train two steps; collectives and bytes of the second, bytes held after either."""
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
        return counter.calls, counter.bytes, held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dp", [2, 4])
def test_a_run_holds_and_moves_what_the_papers_say(dp: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"WIDTH": 64, "FFN": 128, "VOCAB": 64}.items():  # they need no padding
        monkeypatch.setattr(toy, name, size)
    common = Case(optimizer="adamw", dtype=dtype, frozen=(FROZEN,))
    cases = [replace(common, stage=stage, fixed=fixed) for stage in STAGES for fixed in (False, True)]
    cases += [replace(case, shard_size=2) for case in cases if dp == 4 and case.stage and not case.fixed]
    sizes = {name: parameter.numel() for name, parameter in toy.build(cases[0]).named_parameters()}
    frozen = sizes.pop(FROZEN)
    ends = sum(size for name, size in sizes.items() if not name.startswith("blocks."))
    for results in run_ranks(dp, lambda: [measure(case, dp) for case in cases]):
        for case, (_calls, moved, held) in zip(cases, results):
            g, trained = 8 if case.fixed else 4, sum(sizes.values())
            shards = case.shard_size or dp
            papers = by_the_papers(case.stage, shards, case.accumulation, dtype.itemsize, trained, frozen, g, ends)
            across = by_the_papers(0, dp // shards, 1, dtype.itemsize, trained // shards, 0, g).reduced
            papers = replace(papers, reduced=papers.reduced + (across if case.stage else 0))
            gathered = moved.pop("all_gather", 0)
            assert Bytes(held[0], gathered, sum(moved.values())) == papers and held[1] == held[0], case


@pytest.mark.parametrize("m", [1, 2])
def test_one_collective_per_unit(m: int) -> None:
    cases = [Case(stage=stage, accumulation=m, fixed=fixed) for fixed in (False, True) for stage in STAGES]
    calls = [result[0] for result in run_ranks(2, lambda: [measure(case, 2) for case in cases])[0]]
    units = 5  # embedding, three blocks, head
    assert calls == 2 * [
        {"all_reduce": units},
        {"all_gather": units, "reduce_scatter": units},
        {"all_gather": units, "reduce_scatter": m * units},
        {"all_gather": m * (2 * units - 2), "reduce_scatter": m * units},
    ]


@pytest.mark.parametrize("m", [1, 2])
def test_groups_sum_each_unit_once_a_step_beside_the_last_backward_pass(m: int) -> None:
    def reductions(case: Case) -> list[str]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            counter = Counter(monkeypatch)
            model, optimizer = sharded(case, 4)
            backward(model, optimizer, case, 0, 4)
            in_backward = len([name for name in counter.order if name == "all_reduce"])
            optimizer.step(learning_rate(case), case.clip)
            return [name for name in counter.order if name != "all_gather"] + [f"{in_backward} in backward"]

    for stage, waiting in ((1, 2), (2, 1), (3, 1)):
        *order, early = run_ranks(4, reductions, Case(stage=stage, accumulation=m, shard_size=2))[0]
        assert order.count("all_reduce") == 5 and order.count("reduce_scatter") == (5 if stage == 1 else 5 * m)
        assert "all_reduce" not in order[: order.count("reduce_scatter") - 5] and early == f"{5 - waiting} in backward"
