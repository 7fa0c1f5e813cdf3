from __future__ import annotations

import itertools

import pytest

from neox_native.config.schema import Model
from neox_native.parallel.stages import layers_per_stage, rank_of_stage, stage_costs, stage_layers, stages_of_rank


@pytest.mark.parametrize("num_layers, num_stages", [(4, 2), (7, 3), (44, 4), (5, 5), (100, 8)])
@pytest.mark.parametrize("first, last", [(0.0, 0.0), (0.2, 0.6), (1.5, 4.5)])
def test_every_layer_has_one_stage_and_no_stage_is_empty(num_layers, num_stages, first, last):
    counts = layers_per_stage([1.0] * num_layers, num_stages, first, last)
    assert sum(counts) == num_layers and min(counts) >= 1


@pytest.mark.parametrize(
    "layers, num_stages, first, last",
    [
        ([1.0] * 8, 4, 0.3, 1.0),
        ([1.0] * 9, 3, 0.0, 2.0),
        ([1.0] * 10, 4, 0.5, 0.5),
        ([3.0, 1.0, 1.0, 4.0, 0.5, 0.5, 2.0, 1.0], 3, 0.3, 1.0),
        ([1.0, 0.2] * 5, 4, 0.0, 2.0),
    ],
)
def test_the_dearest_stage_is_as_cheap_as_can_be(layers, num_stages, first, last):
    def dearest(counts):
        ends = list(itertools.accumulate(counts))
        costs = [sum(layers[end - count : end]) for count, end in zip(counts, ends)]
        return max([costs[0] + first, *costs[1:-1], costs[-1] + last])

    def partitions(count, stages):
        if stages == 1:
            yield [count]
            return
        for number in range(1, count - stages + 2):
            yield from ([number, *rest] for rest in partitions(count - number, stages - 1))

    best = min(dearest(counts) for counts in partitions(len(layers), num_stages))
    assert dearest(layers_per_stage(layers, num_stages, first, last)) == pytest.approx(best)


def test_a_heavy_head_takes_layers_from_the_last_stage():
    model = Model(num_layers=8, hidden_size=64, vocab_size=50000, seq_length=128)
    layers, _, head = stage_costs(model)
    assert head > 3 * layers[0]
    counts = [len(layers) for layers in stage_layers(model, 2)]
    assert counts[0] > counts[1]


def test_explicit_boundaries_win():
    assert stage_layers(Model(num_layers=6), 3, [1, 4, 1]) == [range(0, 1), range(1, 5), range(5, 6)]


@pytest.mark.parametrize("schedule, virtual_stages", [("1f1b", 1), ("interleaved_1f1b", 3), ("zbv", 2)])
def test_every_stage_has_one_rank(schedule, virtual_stages):
    stages = [(stage, rank) for rank in range(4) for stage in stages_of_rank(rank, 4, virtual_stages, schedule)]
    assert sorted(stage for stage, _ in stages) == list(range(4 * virtual_stages))
    assert all(rank_of_stage(stage, 4, schedule) == rank for stage, rank in stages)


def test_v_shape_puts_both_ends_on_the_first_rank():
    assert stages_of_rank(0, 4, 2, "zbv") == [0, 7]
