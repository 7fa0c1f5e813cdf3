"""A signal on one rank makes all ranks leave after the same step."""

from __future__ import annotations

import os
import signal

import pytest
import torch.distributed as dist

from neox_native.metrics.preemption import LeaveRequest
from tests.ranks import run_ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_all_ranks_leave_after_the_same_step(number: signal.Signals) -> None:
    def rank() -> tuple[int, str]:
        leave = LeaveRequest()
        for step in range(1, 10):
            if step == 4 and dist.get_rank() == 1:
                os.kill(os.getpid(), number)
            reason = leave.after_step()
            if reason is not None:
                leave.close()
                return step, reason
        raise AssertionError("the signal was lost")

    assert run_ranks(3, rank) == [(5, number.name)] * 3


def test_one_process_leaves_at_once_and_gives_the_signals_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    leave = LeaveRequest()
    assert leave.after_step() is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert leave.after_step() == "SIGTERM"
    leave.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_all_ranks_hear_of_a_failure_after_the_same_step() -> None:
    def rank() -> list[int]:
        leave = LeaveRequest()
        heard = []
        for step in range(1, 8):
            assert leave.after_step(failed=step == 3 and dist.get_rank() == 1) is None
            if leave.failed:
                heard.append(step)
        leave.close()
        return heard

    assert run_ranks(3, rank) == [[4]] * 3
