"""Bad steps are counted, named and end the run; spikes are found against the recent past."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from neox_native.config.schema import Training
from neox_native.engine.spikes import SpikeGuard
from neox_native.errors import UserError
from neox_native.reliability.bad_steps import BadSteps, EmptySteps
from tests.ranks import run_ranks


def guard(window: int = 4, threshold: float = 3.0) -> SpikeGuard:
    return SpikeGuard(Training(spike_window=window, spike_threshold=threshold), torch.device("cpu"))


def spikes(found: SpikeGuard, losses: list[float]) -> list[bool]:
    return [bool(found.is_spike(torch.tensor(loss))) for loss in losses]


def test_bad_steps_are_named_with_their_samples() -> None:
    counter = BadSteps(Training(max_bad_steps=2))
    for step, bad in enumerate([0.0, 1.0, 0.0, 1.0], start=1):
        counter.record(step, (10 * step, 10 * step + 1), torch.tensor(bad))
    found = counter.collect()
    assert [(bad.step, bad.sample_ids, bad.in_a_row) for bad in found] == [(2, (20, 21), 1), (4, (40, 41), 1)]
    assert str(found[0]) == "step 2: update skipped, 1 in a row; sample ids 20, 21"
    assert counter.collect() == [] and counter.verdict() is None


def test_more_than_the_limit_in_a_row_ends_the_run_across_logged_steps() -> None:
    counter = BadSteps(Training(max_bad_steps=2))
    for step in (1, 2, 3):
        counter.record(step, (), torch.tensor(True))
        counter.collect()
        assert (counter.verdict() is None) == (step <= 2)
    verdict = counter.verdict()
    assert isinstance(verdict, UserError) and "training.max_bad_steps = 2" in str(verdict)
    counter.record(4, (), torch.tensor(False))
    counter.collect()
    assert counter.verdict() is None


def test_too_many_in_a_row_end_the_run_though_a_good_step_followed_before_the_log() -> None:
    counter = BadSteps(Training(max_bad_steps=2))
    for step, bad in enumerate((True, True, True, False)):
        counter.record(step, (), torch.tensor(bad))
    assert len(counter.collect()) == 3 and "3 steps in a row" in str(counter.verdict())


def test_bad_steps_before_a_restart_count() -> None:
    counter, later = BadSteps(Training(max_bad_steps=2)), BadSteps(Training(max_bad_steps=2))
    for step in (1, 2):
        counter.record(step, (), torch.tensor(True))
    assert len(counter.collect()) == counter.count == 2
    later.go_on_from(counter.count)
    assert later.verdict() is None
    later.record(3, (), torch.tensor(True))
    assert later.collect()[0].in_a_row == later.count == 3 and later.verdict() is not None


def test_a_step_is_empty_only_if_no_rank_had_a_target() -> None:
    def rank() -> tuple[list[int], list[int]]:
        empty = EmptySteps(dist.group.WORLD, torch.device("cpu"))
        for step, counts in enumerate([(0, 0), (0, 3), (5, 0), (0, 0)], start=1):
            empty.record(step, counts[dist.get_rank()])
        return empty.collect(), empty.collect()

    assert run_ranks(2, rank) == [([1, 4], [])] * 2


def test_zero_limit_never_ends_the_run() -> None:
    counter = BadSteps(Training(max_bad_steps=0))
    for step in range(50):
        counter.record(step, (), torch.tensor(True))
    assert len(counter.collect()) == 50 and counter.verdict() is None


def test_spike_is_found_only_with_a_full_window_and_stays_out_of_it() -> None:
    assert spikes(guard(), [100.0, 1.0, 1.1, 0.9]) == [False] * 4
    assert spikes(guard(), [1.0, 1.1, 0.9, 1.0, 2.0, 2.0, 1.1]) == [False, False, False, False, True, True, False]


def test_numbers_that_are_not_finite_and_losses_of_no_target_do_not_enter_the_window() -> None:
    found = guard()
    spikes(found, [1.0, 1.1, float("nan"), 0.9, float("inf"), 0.0, 1.0])
    assert found.state.tolist() == pytest.approx([1.0, 1.1, 0.9, 1.0, 4.0])
    assert spikes(found, [float("inf"), 5.0]) == [True, True]


def test_window_restored_from_a_checkpoint_decides_alike() -> None:
    one, other = guard(), guard()
    spikes(one, [1.0, 1.1, 0.9, 1.0, 1.05])
    other.state.copy_(one.state)
    assert spikes(one, [1.2, 3.0]) == spikes(other, [1.2, 3.0])
