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
from neox_native.config.check import require
from neox_native.config.schema import Config
from neox_native.launch import Launch, start_process_group, Ranks
from neox_native.reliability.preemption import Requests
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
LET_BE = r"before-\d+|checkpoints/step_00000000[01]\b(?!\.)"
PROCESSES = 10
"""One after another, for all trials: a run in a process leaves threads of its groups there."""
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
        self.leave_behind()
        self.work = Work(folder / "root", self.do, self.again)

    def leave_behind(self) -> None:
        """What lies there when the work begins."""
        shutil.rmtree(self.run_dir)

    def tree(self) -> disk.Tree:
        """What the run left but for logs, for what it was told to set aside, and for checkpoints before the last: where a crash or a refusal fell between a save
        and a deletion, another one is there, to go with the next save."""
        tree = without(disk.Disk.read(self.run_dir).tree(), *LOGS)
        return {path: content for path, content in tree.items() if not re.match(LET_BE, path)}

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
        assert not (wrong := list(differences(self.tree(), self.expected))), wrong
        assert curve(self.run_dir) == self.curve
        for path in files.finished(self.run_dir / "checkpoints"):
            assert not (damage := store.find_damage(path, Ranks())), damage
        kinds = [json.loads(line)["kind"] for line in (self.run_dir / "events.jsonl").read_text().splitlines()]
        assert "export" in kinds
        self.kept_promises(promised, output)

    def kept_promises(self, promised: list[disk.Op], output: str) -> None:
        """It went on where it stood."""
        resumed = [int(line.split()[-1]) for line in output.splitlines() if line.startswith("resumed ")]
        saved = max((op.b for op in promised), default=0)
        assert (resumed or [0])[0] >= saved, f"step {saved} was saved, but the run resumed {resumed}"
        assert "Skipping" not in output, output


class OverDamage(Training):
    """A run whose last checkpoint was damaged: it goes on from the one before and saves and exports the last again."""

    def leave_behind(self) -> None:
        shard = next((self.run_dir / "checkpoints" / "step_000000002").glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-1])

    def kept_promises(self, promised: list[disk.Op], output: str) -> None:
        assert "resumed" in output and (not promised or "Skipping" not in output), output


class Anew(Training):
    """A run begun anew in the folder of a finished one, which is set aside."""

    def leave_behind(self) -> None:
        self.finished = disk.Disk.read(self.run_dir / "checkpoints").tree()

    def kept_promises(self, promised: list[disk.Op], output: str) -> None:
        aside = [disk.Disk.read(path).tree() for path in self.run_dir.glob("before-*/checkpoints")]
        assert self.finished in aside


def tried(folder: Path, kind: str, sample: int | None, way: str) -> int:
    """Try a run; the number of its crash points, or of what its disk can refuse."""

    def rank(part: int, parts: int) -> tuple[int, list[str]]:
        (folder / str(part)).mkdir()
        make, *changes = WAYS[way]
        work = make(folder / str(part), *changes).work
        return getattr(work, kind)(sample, slice(part, None, parts)), work.wrong

    parts, number = 1 if sample else PROCESSES, 0
    for part in range(parts):
        ((more, wrong),) = run_ranks(1, rank, part, parts, timeout_seconds=3000)
        number += more
        assert not wrong, f"{len(wrong)} of {more}:\n" + "\n".join(wrong[:12])
    return number


WAYS = {
    "in the foreground": (Training,),
    "in the background": (Training, "--checkpoint.async=true"),
    "over damage": (OverDamage, "--checkpoint.keep_last=2"),
    "anew": (Anew, "--checkpoint.resume=none"),
}
"""How the run goes, and the settings for it."""


@pytest.mark.parametrize("way", WAYS)
def test_some_crashes(tmp_path: Path, way: str) -> None:
    assert tried(tmp_path, "crash", 12, way) > 300


def test_some_refusals(tmp_path: Path) -> None:
    assert tried(tmp_path, "refuse", 12, "in the foreground") > 300


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["crash", "refuse"])
@pytest.mark.parametrize("way", WAYS)
def test_all(tmp_path: Path, way: str, kind: str) -> None:
    count(kind, tried(tmp_path, kind, None, way))
