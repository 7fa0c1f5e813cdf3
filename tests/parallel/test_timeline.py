from __future__ import annotations

import pytest

from neox_native.parallel.timeline import timeline


@pytest.mark.parametrize("pp, microbatches", [(2, 4), (4, 4), (4, 16)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_bubble_of_gpipe_and_1f1b_is_p_minus_1_over_m(schedule, pp, microbatches):
    assert timeline(schedule, pp, 1, microbatches).bubble_fraction == pytest.approx((pp - 1) / microbatches)


@pytest.mark.parametrize("pp, virtual_stages, microbatches", [(2, 2, 4), (4, 2, 8), (4, 3, 8)])
def test_interleaving_divides_the_bubble_by_the_virtual_stages(pp, virtual_stages, microbatches):
    bubble = timeline("interleaved_1f1b", pp, virtual_stages, microbatches).bubble_fraction
    assert bubble == pytest.approx((pp - 1) / (virtual_stages * microbatches))


def test_zero_bubble_schedules_wait_less_than_1f1b():
    plain, interleaved, zbv = (
        timeline(name, 4, virtual, 8).bubble_fraction
        for name, virtual in (("1f1b", 1), ("interleaved_zero_bubble", 2), ("zbv", 2))
    )
    assert zbv <= interleaved < plain / 2


def test_peak_in_flight_is_m_for_gpipe_and_p_for_1f1b():
    assert timeline("gpipe", 4, 1, 8).peak_in_flight(0) == 8
    assert [timeline("1f1b", 4, 1, 8).peak_in_flight(rank) for rank in range(4)] == [4, 3, 2, 1]


@pytest.mark.parametrize(
    "schedule, virtual_stages",
    [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("looped_bfs", 2), ("interleaved_zero_bubble", 2), ("zbv", 2)],
)
def test_every_microbatch_passes_every_stage_once_each_way(schedule, virtual_stages):
    spans = [span for rank in timeline(schedule, 4, virtual_stages, 8).ranks for span in rank]
    forwards = [span.action for span in spans if span.action.kind == "F"]
    backwards = [span.action for span in spans if span.action.kind in "BI"]
    assert len(set(forwards)) == len(forwards) == len(backwards) == 4 * virtual_stages * 8


def test_without_a_pipeline_there_is_no_bubble():
    assert timeline("1f1b", 1, 1, 4).bubble_fraction == 0
