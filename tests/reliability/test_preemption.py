"""A request to leave is heard whatever the main thread does, is agreed among all ranks, and every process ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from neox_native.launch import Launch, Ranks
from neox_native.reliability import preemption
from neox_native.reliability.preemption import LAUNCHER_GONE, LeaveRequest, Requests, end_of_process
from tests import ranks
from tests.ranks import RankError, run_ranks



@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Not those of a test run in the background, where Ctrl-C is ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in preemption.REQUESTS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank that never ends, in some tests here, need not be waited for."""
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.1)


ALONE = Launch(rank=0, local_rank=0, world_size=1)


class Heard(Requests):
    """Requests whose clock is ours and whose end is written down. The thread is told to look now and then, too: it only
    does what the test does."""

    def __init__(self, launch: Launch = ALONE) -> None:
        self.now, self.ends = 100.0, []
        super().__init__(launch, end=self.ends.append, clock=lambda: self.now)


@contextmanager
def hearing(launch: Launch = ALONE, steps_done: bool = True) -> Iterator[Heard]:
    requests = Heard(launch)
    if steps_done:
        requests.step_done()
    try:
        yield requests
    finally:
        requests.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_all_ranks_leave_after_the_same_step(number: signal.Signals) -> None:
    def rank() -> tuple[int, str]:
        requests = Requests(ALONE)
        leave = LeaveRequest(requests)
        for step in range(1, 10):
            if step == 4 and dist.get_rank() == 1:
                os.kill(os.getpid(), number)
            reason = leave.after_step()
            if reason is not None:
                return step, reason
        raise AssertionError("the signal was lost")

    assert run_ranks(3, rank) == [(5, number.name)] * 3


def test_all_ranks_hear_of_a_failure_after_the_same_step() -> None:
    def rank() -> list[int]:
        leave = LeaveRequest(Requests(ALONE))
        heard = []
        for step in range(1, 8):
            assert leave.after_step(failed=step == 3 and dist.get_rank() == 1) is None
            if leave.failed:
                heard.append(step)
        return heard

    assert run_ranks(3, rank) == [[4]] * 3


def test_one_process_leaves_after_its_step_and_gives_the_signals_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with hearing() as requests:
        leave = LeaveRequest(requests)
        assert leave.after_step() is None
        requests.hear(signal.SIGTERM)
        assert leave.after_step() == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGINT, signal.SIGTERM, 143),  # what torchrun makes of a second Ctrl-C
        (signal.SIGUSR1, signal.SIGTERM, None),  # the end of the job's time was announced, and now it comes
        (signal.SIGTERM, signal.SIGUSR1, None),
        (signal.SIGINT, LAUNCHER_GONE, None),
    ],
)
def test_a_second_request_leaves_at_once(first: int, second: int, status: int | None, capsys) -> None:
    with hearing() as requests:
        requests.hear(first)
        requests.hear(first)
        assert requests.ends == []  # a scheduler tells torchrun and its ranks: within a second both are one request
        requests.now += 1.5
        requests.hear(second)
        assert requests.ends == ([status] if status else [])
    sentences = capsys.readouterr().err.splitlines()
    assert "leaving after the next step, when the state is saved" in sentences[0]
    assert status is None or sentences[1].endswith("leaving at once. What is saved stands.") and len(sentences) == 2


def test_before_the_first_step_is_done_a_request_leaves_at_once(capsys) -> None:
    with hearing(steps_done=False) as requests:
        for number in (signal.SIGINT, signal.SIGUSR1):
            requests.hear(number)
        assert requests.ends == [130, 0]  # torchrun restarts what fails: the end of a job's time is no failure
    assert capsys.readouterr().err.splitlines()[0] == (
        "SIGINT before the first step was done: leaving, as there is nothing to save."
    )


def test_request_is_heard_while_the_main_thread_waits_for_another_rank() -> None:
    def rank() -> None:
        Requests(Launch(rank=0, local_rank=dist.get_rank(), world_size=2))
        if dist.get_rank() == 1:
            threading.Event().wait()
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        dist.all_reduce(torch.ones(1))  # runs no Python until rank 1 comes

    with pytest.raises((RankError, FileNotFoundError)):
        run_ranks(2, rank, timeout_seconds=20)


def test_ignored_signal_stays_ignored_and_a_child_has_its_own() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with hearing() as requests:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            child = os.fork()
            if child == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == signal.SIGTERM
            assert requests.reason == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_rank_whose_launcher_is_gone_asks_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    with hearing(Launch(0, 0, 1, job="none")) as requests:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        requests.look()
        assert LeaveRequest(requests).after_step() == "the end of torchrun"
    with hearing() as requests:  # a shell may end before what it has started
        requests.look()
        assert requests.reason == 0


def test_work_that_is_over_has_a_limited_time_to_end(capsys) -> None:
    with hearing() as requests:
        requests.end_within(10.0)
        requests.now += 9.0
        requests.look()
        assert requests.ends == []
        requests.now += 2.0
        requests.look()
        assert preemption.EXIT_STATUS in requests.ends
    assert "does not end by itself" in (report := capsys.readouterr().err) and "thread" in report


def test_lost_peers_of_a_rank_that_was_asked_to_leave_are_no_error() -> None:
    lost = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(RuntimeError), hearing() as requests, requests:
        raise lost
    with pytest.raises(SystemExit) as leaving, hearing() as requests, requests:
        requests.hear(signal.SIGINT)
        raise lost
    assert leaving.value.code == 130


@pytest.mark.parametrize("end", [SystemExit(3), AssertionError("a bug")], ids=["in good order", "with an error"])
def test_process_ends_beside_a_collective_that_no_rank_joins(end: BaseException) -> None:
    def rank() -> None:
        group = dist.new_group(backend="gloo")
        if dist.get_rank() == 1:
            threading.Event().wait()
        with end_of_process():
            dist.all_reduce(torch.ones(1), group=group, async_op=True)
            threading.Thread(target=threading.Event().wait).start()  # finalisation would wait for it, too
            raise end

    with pytest.raises((RankError, FileNotFoundError)):
        run_ranks(2, rank, timeout_seconds=20)


def test_console_outlives_its_reader() -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        console = preemption.Console(stream)
        os.close(reader)
        for _ in range(2):
            print("nobody reads this", file=console, flush=True)
        assert console.fileno() == stream.fileno() and sys.stdout is not console


def test_nothing_of_it_stays_when_it_is_closed() -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_files(), threading.active_count()
    for _ in range(3):
        requests = Heard()
        requests.close()
        requests.thread.join()
    assert (open_files(), threading.active_count()) == before


@pytest.mark.parametrize(
    "asked, restarts_left, going_on",
    [
        ({0: signal.SIGTERM}, 3, [1]),
        ({3: LAUNCHER_GONE, 2: LAUNCHER_GONE}, 3, [0]),
        ({0: signal.SIGTERM, 2: signal.SIGTERM}, 3, []),
        ({0: signal.SIGINT}, 3, []),
        ({0: signal.SIGTERM}, 0, []),
    ],
)
def test_nodes_that_were_not_asked_to_leave_are_started_again(asked: dict[int, int], restarts_left: int, going_on: list[int]) -> None:
    def rank() -> list[int]:
        launch = Launch(dist.get_rank(), dist.get_rank() % 2, 4, node=dist.get_rank() // 2, restarts_left=restarts_left)
        with hearing(launch) as requests:
            leave = LeaveRequest(requests)
            requests.reason = asked.get(launch.rank, 0)
            return leave.goes_on(launch, Ranks())

    assert run_ranks(4, rank) == [going_on] * 4
