"""Runs under torchrun that are asked to leave, or whose torchrun is killed: they save, and no process stays."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import train as entry
from neox_native.checkpoint import files
from neox_native.config.check import require
from neox_native.config.load import dump
from neox_native.launch import Launch
from neox_native.reliability.preemption import Requests, end_of_process
from tests.checkpoint.small_runs import events, settings, write_corpus
from tests.ranks import children_of, run_ranks

ROOT = Path(__file__).resolve().parents[2]


class Job:
    """A run of two ranks under torchrun without an end of its own."""

    def __init__(self, folder: Path, *changes: str) -> None:
        config = settings(write_corpus(folder), folder / "run", "--parallel.dp=2", "--training.steps=1000000", *changes)
        (folder / "settings.toml").write_text(dump(config))
        command = [
            sys.executable, "-u", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "train.py", f"--config={folder / 'settings.toml'}",
        ]  # fmt: skip
        self.folder, self.output = folder / "run", ""
        self.launcher = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def read_until(self, text: str | None) -> None:
        """Read until a line holds `text`; None: until every process that could write has ended."""
        assert self.launcher.stdout is not None
        for line in self.launcher.stdout:
            self.output += line
            if text is not None and text in line:
                return
        assert text is None, self.output


@pytest.fixture
def job(tmp_path: Path):
    """Starts a job, and sees to it that nothing of it stays."""
    jobs: list[Job] = []

    def start(*changes: str) -> Job:
        jobs.append(Job(tmp_path, *changes))
        return jobs[-1]

    yield start
    for started in jobs:
        started.launcher.kill()
        started.launcher.communicate(timeout=60)


def left_in_good_order(job: Job, reason: str) -> None:
    """The step after the request is saved, and no rank printed a traceback."""
    [event] = events(job.folder, "signal")
    assert f"leaving after {reason}; the state is saved" in event["message"]
    assert files.step_of(files.finished(job.folder / "checkpoints")[0]) == event["step"]
    assert f"{ROOT}/train.py" not in job.output and "gloo" not in job.output


def test_ctrl_c_saves_and_leaves(job) -> None:
    """To the whole group: each rank gets it twice, from the terminal and from torchrun."""
    running = job("--checkpoint.save_every=1000000")
    running.read_until("step       3/")
    for process in (*children_of(running.launcher), running.launcher.pid):
        os.kill(process, signal.SIGINT)
    running.read_until(None)
    assert running.output.count("SIGINT: leaving after the next step") == 1
    left_in_good_order(running, "SIGINT")


def test_ranks_that_torchrun_left_behind_save_and_leave(job) -> None:
    running = job("--checkpoint.save_every=1000000")
    running.read_until("step       3/")
    running.launcher.kill()
    running.read_until(None)
    left_in_good_order(running, "the end of torchrun")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_other_requests_to_torchrun_save_and_leave(job, number: signal.Signals) -> None:
    running = job("--checkpoint.save_every=1000000")
    running.read_until("step       3/")
    running.launcher.send_signal(number)
    running.read_until(None)
    left_in_good_order(running, number.name)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["mesh pp", "train: ", "step 0: predicted"])
def test_ctrl_c_in_start_up_leaves_with_a_sentence(job, moment: str) -> None:
    running = job()
    running.read_until(moment)
    running.launcher.send_signal(signal.SIGINT)
    running.read_until(None)
    assert "there is nothing to save" in running.output or "leaving after the next step" in running.output
    assert f"{ROOT}/train.py" not in running.output and "gloo" not in running.output


LAYOUTS = [
    ["--parallel.dp=2"], ["--parallel.dp=1", "--parallel.tp=2"], ["--parallel.dp=1", "--parallel.pp=2"],
    ["--parallel.dp=2", "--parallel.tp=2", "--parallel.zero_stage=1"],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_ranks_interrupted_at_any_moment_all_leave(tmp_path: Path, seed: int, capfd) -> None:
    draw = random.Random(seed)
    changes = [*draw.choice(LAYOUTS), f"--checkpoint.async={draw.choice(['true', 'false'])}", "--checkpoint.save_every=5"]
    validation = ["--evaluation.every=4", "--evaluation.batches=4", "--data.split=80,20,0"]
    config = settings(write_corpus(tmp_path), tmp_path, *changes, *validation, "--training.steps=1000000")
    size, seconds = config.parallel.pp * config.parallel.dp * config.parallel.tp, draw.uniform(0.0, 3.0)

    def rank() -> None:
        with end_of_process(), Requests(Launch.from_environment()) as requests:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()
            entry.train(require(config, size), torch.device("cpu"), requests)

    with pytest.raises(FileNotFoundError):  # they end without a result, not by a TimeoutError
        run_ranks(size, rank, timeout_seconds=60)
    output = "".join(capfd.readouterr())
    assert "Traceback" not in output
    assert "there is nothing to save" in output or "leaving after SIGTERM; the state is saved" in output
