"""A hang is noticed, located and ended; the slowest rank is named."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from neox_native.config.schema import Run
from neox_native.reliability import watchdog as module
from neox_native.reliability.stragglers import slowest_ranks
from neox_native.reliability.watchdog import Position, Watchdog, job_store, report_hang
from tests.ranks import RankError, run_ranks

QUICK = Run(watchdog_factor=2.0, watchdog_min_seconds=0.3, watchdog_startup_seconds=60.0)


def watchdog(folder: Path, run: Run = QUICK) -> Watchdog:
    """A watchdog that looks often and appends its report to a file."""
    def report(text: str) -> None:
        with open(folder / "report", "a") as file:
            file.write(text + "\n")

    return Watchdog(run, dist.get_rank(), dist.get_world_size(), folder, job_store(), report, poll_seconds=0.05)


def sleep_for_ever() -> None:
    threading.Event().wait()


def hang(tmp_path: Path, culprit_does) -> str:
    """Three ranks, of which rank 1 stops in step 8 while the others wait for it in a collective; the report."""
    def rank() -> None:
        dog = watchdog(tmp_path)
        dog.measured(0.01)
        for step in range(1, 10):
            dog.at(step, "train")
            dog.microbatch(step % 2)
            if step == 8 and dist.get_rank() == 1:
                culprit_does()
            dist.all_reduce(torch.ones(1))

    with pytest.raises((RankError, FileNotFoundError)):  # the ranks leave no result behind
        run_ranks(3, rank)
    return (tmp_path / "report").read_text()


def test_rank_that_sleeps_is_located_with_its_stack(tmp_path: Path) -> None:
    report = hang(tmp_path, sleep_for_ever)
    assert "rank 1 (" in report and "step 8, train, microbatch 0, no progress for" in report
    assert "ranks [1] are at:" in report and "in sleep_for_ever" in report
    assert "ranks [0, 2] are at:" in report and "all_reduce" in report
    assert report.count("No progress") == 1


def test_rank_that_is_stopped_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    report = hang(tmp_path, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    assert report.splitlines()[1] == "  ranks [1]: no answer (stopped, dead, or stuck outside Python)"


def test_progress_and_long_phases_are_no_hang(tmp_path: Path) -> None:
    def rank() -> None:
        dog = watchdog(tmp_path)
        dog.measured(0.01)
        start = time.monotonic()
        while time.monotonic() - start < 0.5:
            dog.at(1, "train")
        dog.at(1, "save")
        assert dog.limit_seconds() == 60.0
        threading.Event().wait(0.5)
        dog.close()

    run_ranks(2, rank)
    assert not (tmp_path / "report").exists()


def test_a_rank_that_waits_for_one_that_told_why_it_ends_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.2)

    def rank() -> None:
        dog = watchdog(tmp_path)
        if dist.get_rank() == 1:
            sleep_for_ever()  # as in a GPU's collective
        dog.at(3, "train")
        dog.end()
        assert dog.where() == "step 3, train, microbatch 0" and dog.limit_seconds() == 60.0
        assert dog.tell("no memory") == dog.tell("another reason") == dog.told() == "no memory"
        dog.close()

    with pytest.raises(FileNotFoundError, match="1.result"):
        run_ranks(2, rank)
    assert capfd.readouterr().err == "error: no memory\n" and not (tmp_path / "report").exists()


def test_limit_is_a_multiple_of_the_median_step() -> None:
    dog = Watchdog(Run(watchdog_factor=0.0), 0, 1, Path(), dist.HashStore())
    dog.at(1, "train")
    assert dog.limit_seconds() == Run().watchdog_startup_seconds
    dog.run = Run(watchdog_factor=10.0, watchdog_min_seconds=5.0)
    for seconds in (1.0, 100.0, 2.0):
        dog.measured(seconds)
    assert dog.limit_seconds() == 20.0
    dog.close()


def test_report_groups_equal_stacks_and_puts_the_last_first() -> None:
    def at(rank: int, step: int, stacks: str) -> Position:
        return Position(rank, "host", step, "train", 0, 60.0, stacks)

    lines = report_hang([at(0, 5, "waiting"), at(1, 4, "stuck"), at(2, 5, "waiting")], 4).splitlines()
    assert "ranks [3]: no answer" in lines[1] and "rank 1 (host): step 4" in lines[2]
    assert "ranks [0, 2] are at:" in lines and "ranks [1] are at:" in lines


def test_slowest_rank_of_each_stage_is_named() -> None:
    places = [(0, "a", 1.0), (0, "b", 1.5), (1, "a", 1.0), (1, "c", 0.9), (0, "d", 1.1)]
    assert slowest_ranks(places) == [
        "stage 0: slowest is rank 1 (b) with 1.500 s a step, median 1.100 s",
        "stage 1: slowest is rank 2 (a) with 1.000 s a step, median 0.950 s",
    ]


def test_flight_recorder_is_on_unless_the_user_said_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "17")
    monkeypatch.delenv("TORCH_NCCL_DUMP_ON_TIMEOUT", raising=False)
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE", raising=False)
    module.enable_flight_recorder(tmp_path / "recorder")
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "17" and os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"].startswith(str(tmp_path))


def test_last_collectives_are_written_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")

    def rank() -> list[str]:
        dist.all_reduce(torch.ones(3))
        path = module.dump_flight_recorder(tmp_path, dist.get_rank())
        assert path is not None
        return [entry["profiling_name"] for entry in json.loads(path.read_text())["entries"]]

    assert all(any("all_reduce" in name for name in names) for names in run_ranks(2, rank))


class Times:
    """A clock that is set by hand, for watchdogs without a thread."""

    def __init__(self, ranks: int = 1) -> None:
        self.now, self.store = 0.0, dist.HashStore()
        run = Run(watchdog_factor=0.0, watchdog_startup_seconds=1000.0, watchdog_min_seconds=10.0)
        self.dogs = [Watchdog(run, rank, ranks, Path(), self.store, clock=lambda: self.now) for rank in range(ranks)]

    def pass_by(self, seconds: int, watching: list[Watchdog]) -> bool:
        """Whether one of those that look every second has raised an alarm."""
        for _ in range(seconds):
            self.now += 1.0
            if any([dog.look() for dog in watching]):
                return True
        return False


@pytest.mark.parametrize("main_thread_first", [False, True])
def test_time_during_which_the_watchdog_itself_was_stopped_is_no_hang(main_thread_first: bool) -> None:
    times = Times()
    dog = times.dogs[0]
    dog.at(1, "train")
    dog.measured(0.1)
    dog.run = Run(watchdog_factor=1.0, watchdog_min_seconds=10.0)
    assert not times.pass_by(5, times.dogs)
    times.now += 3600.0  # Ctrl-Z and, after a while, fg
    if main_thread_first:
        dog.at(2, "train")
    assert not times.pass_by(4, times.dogs)
    assert times.pass_by(10, times.dogs)  # it is really stuck


def test_stopped_rank_is_noticed_though_its_phase_may_take_long() -> None:
    times = Times(ranks=3)
    assert not times.pass_by(400, times.dogs)
    assert not times.pass_by(299, times.dogs[:2])  # the third is stopped; the second looks after it
    assert times.pass_by(5, times.dogs[:2])


def test_rank_that_ended_in_good_order_is_not_missed() -> None:
    times = Times(ranks=2)
    assert not times.pass_by(10, times.dogs)
    Watchdog(Run(), 1, 2, Path(), times.store, poll_seconds=0.01).close()
    assert not times.pass_by(500, times.dogs[:1])
