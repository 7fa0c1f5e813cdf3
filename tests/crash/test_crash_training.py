"""A run that loses power, or whose disk refuses, at each of its operations goes on as if nothing had happened.

The work is the entry point itself on one rank: saves in the foreground or background, retention, both exports, the logs,
the settings. TensorBoard's files are left out: its library writes them in a thread of its own, and nothing reads them here.
After each crash the same command runs to its end; its folder must then hold, byte for byte, what an undisturbed run's does.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train as entry
from neox_native.checkpoint import files, store
from neox_native.checkpoint.agree import Ranks
from neox_native.config.check import require
from neox_native.config.schema import Config
from neox_native.mesh import Launch, start_process_group
from neox_native.metrics.preemption import Requests
from tests.checkpoint.small_runs import curve, settings, write_corpus
from tests.crash import disk
from tests.crash.recorder import Recorder
from tests.crash.trials import Work, count, differences, without
from tests.ranks import run_ranks

TINY = [
    "--model.num_layers=1", "--model.hidden_size=8", "--model.num_heads=2", "--model.rotary_pct=1.0", "--model.seq_length=4",
    "--training.steps=2", "--training.global_batch_size=1", "--checkpoint.save_every=1", "--checkpoint.keep_last=1",
    "--checkpoint.export=fp32", "--checkpoint.export_hf_every=1", "--data.tokenizer=", "--run.watchdog_factor=0",
]  # fmt: skip
LOGS = "metrics.jsonl", "events.jsonl", ".lock"
"""What holds times and process numbers."""


def run(config: Config) -> str:
    """The whole run; returns what it printed."""
    launch = Launch.from_environment()
    dist.destroy_process_group()  # with the groups of the run before, whose threads would add up
    start_process_group(torch.device("cpu"), launch)
    requests = Requests(launch)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            entry.train(config, torch.device("cpu"), requests)
        return output.getvalue()
    finally:
        requests.close()
        if len(os.listdir("/proc/self/task")) > 100:
            gc.collect()  # groups of earlier runs keep their threads until then


class Training:
    """A tiny run below `folder`, as work to be tried."""

    def __init__(self, folder: Path, *changes: str) -> None:
        os.fsync = lambda _: None  # in a forked rank; what is tried is synced on the model of the disk
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a run leaves its lock to the end of its process
        (folder / "root").mkdir()
        self.run_dir = folder / "root" / "run"
        self.config = require(settings(write_corpus(folder), self.run_dir, *TINY, *changes), 1)
        run(self.config)
        self.expected, self.curve = self.tree(), curve(self.run_dir)
        shutil.rmtree(self.run_dir)
        self.work = Work(folder / "root", self.do, self.again)

    def tree(self) -> disk.Tree:
        """What the run left but for logs, and for checkpoints before the last: where a crash or a refusal fell between a save
        and a deletion, another one is there, to go with the next save."""
        tree = without(disk.Disk.read(self.run_dir).tree(), *LOGS)
        return {path: content for path, content in tree.items() if not re.match(r"checkpoints/step_00000000[01]\b(?!\.)", path)}

    def do(self, recorder: Recorder) -> None:
        save = store.save

        def marked(directory: Path, step: int, *arguments: object) -> Path:
            path = save(directory, step, *arguments)
            recorder.mark("saved", step)
            return path

        store.save = marked
        try:
            run(self.config)
        finally:
            store.save = save

    def again(self, promised: list[disk.Op]) -> None:
        output = run(self.config)
        resumed = [int(line.split()[-1]) for line in output.splitlines() if line.startswith("resumed ")]
        saved = max((op.b for op in promised), default=0)
        assert (resumed or [0])[0] >= saved, f"step {saved} was saved, but the run resumed {resumed}"
        assert "Skipping" not in output, output
        assert curve(self.run_dir) == self.curve
        assert not (wrong := list(differences(self.tree(), self.expected))), wrong
        for path in files.finished(self.run_dir / "checkpoints"):
            assert not (damage := store.find_damage(path, Ranks())), damage
        kinds = [json.loads(line)["kind"] for line in (self.run_dir / "events.jsonl").read_text().splitlines()]
        assert "export" in kinds


def tried(folder: Path, kind: str, sample: int | None, *changes: str) -> int:
    """Try a run; the number of its crash points, or of what its disk can refuse."""

    def rank() -> tuple[int, list[str]]:
        work = Training(folder, *changes).work
        number = getattr(work, kind)(sample)
        return number, work.wrong

    ((number, wrong),) = run_ranks(1, rank, timeout_seconds=3000)
    assert not wrong, f"{len(wrong)} of {number}:\n" + "\n".join(wrong[:12])
    return number


WAYS = {
    "in the foreground": (),
    "in the background": ("--checkpoint.async=true",),
}


@pytest.mark.parametrize("way", WAYS)
def test_some_crashes(tmp_path: Path, way: str) -> None:
    assert tried(tmp_path, "crash", 15, *WAYS[way]) > 300


def test_some_refusals(tmp_path: Path) -> None:
    assert tried(tmp_path, "refuse", 12) > 300


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["crash", "refuse"])
@pytest.mark.parametrize("way", WAYS)
def test_all(tmp_path: Path, way: str, kind: str) -> None:
    count(kind, tried(tmp_path, kind, None, *WAYS[way]))
