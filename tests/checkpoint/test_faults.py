"""Ranks that are killed with SIGKILL while they train, evaluate and save: torchrun restarts, and not a bit is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neox_native.checkpoint import files, store
from neox_native.config.load import dump
from neox_native.durable import TEMPORARY
from neox_native.launch import Ranks
from tests.checkpoint.small_runs import curve, run, settings, write_corpus

ROOT = Path(__file__).resolve().parents[2]
WORLD_SIZE, STEPS, KILLS = 4, 21, 3
CHANGES = [
    f"--training.steps={STEPS}", "--training.micro_batch_size=2", "--parallel.dp=2", "--parallel.tp=2",
    "--parallel.zero_stage=1",
    "--checkpoint.save_every=3", "--checkpoint.keep_last=2", "--evaluation.every=4", "--evaluation.batches=4",
    "--data.split=80,20,0",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(settings(corpus, folder, *CHANGES))
    return curve(folder)


def last_step(folder: Path) -> int:
    """The last step in the log, 0 while there is none."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, IndexError, ValueError):
        return 0


def workers(launcher: int) -> list[int]:
    """Process ids of the ranks that torchrun has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher and "train.py" in (stat.parent / "cmdline").read_text():
                found.append(int(stat.parent.name))
        except (OSError, IndexError):
            continue  # it ended while we looked
    return found


class Killer:
    """Kills one rank after another, each at a step, in a phase, and a random moment later."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        steps = sorted(self.draw.sample(range(2, STEPS - 4, 6), KILLS))
        self.plan = list(zip(steps, self.draw.sample(["step", "evaluate", "save"], KILLS), strict=True))
        self.done: list[str] = []

    def due(self) -> bool:
        """Whether the moment of the next kill has come."""
        if not self.plan:
            return False
        step, phase = self.plan[0]
        reached = last_step(self.folder)
        if phase == "evaluate":  # it follows the line of every fourth step
            return reached >= step and reached % 4 == 0
        saving = any(self.folder.glob(f"checkpoints/*{TEMPORARY}*"))
        return reached >= step and (phase == "step" or saving)

    def strike(self, launcher: int) -> None:
        """Kill one rank."""
        ranks = workers(launcher)
        time.sleep(self.draw.uniform(0, 0.01))
        if len(ranks) == WORLD_SIZE:
            os.kill(self.draw.choice(ranks), signal.SIGKILL)
            self.done.append("{1} at step {0}".format(*self.plan.pop(0)))
            while set(workers(launcher)) & set(ranks):  # until torchrun has cleared away the others too
                time.sleep(0.01)


def run_and_kill(folder: Path, corpus: str, seed: int, in_background: bool) -> tuple[str, list[str]]:
    """A run under torchrun that loses a rank `KILLS` times; its output and the kills."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}",
        f"--max-restarts={KILLS}", "train.py", f"--config={folder / 'settings.toml'}",
    ]  # fmt: skip
    config = settings(corpus, folder, *CHANGES, f"--checkpoint.async={str(in_background).lower()}")
    (folder / "settings.toml").write_text(dump(config))
    killer = Killer(folder, seed)
    with open(folder / "output", "w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 600
            while launcher.poll() is None and time.monotonic() < deadline:
                if killer.due():
                    killer.strike(launcher.pid)
                time.sleep(0.002)
        finally:
            launcher.kill()
    assert launcher.wait() == 0, (folder / "output").read_text()
    return (folder / "output").read_text(), killer.done


def survives(folder: Path, corpus: str, expected: list[tuple], seed: int, in_background: bool) -> None:
    output, kills = run_and_kill(folder, corpus, seed, in_background)
    assert len(kills) == KILLS, (kills, output)
    assert curve(folder) == expected, kills
    assert output.count("resumed ") >= KILLS - 1, (kills, output)  # a kill before the first save starts anew
    # No partial checkpoint has a final name, so none was skipped, and those that are left are whole.
    assert "Skipping" not in output
    checkpoints = files.finished(folder / "checkpoints")
    assert [files.step_of(path) for path in checkpoints] == [21, 18]
    assert all(store.find_damage(path, Ranks()) == [] for path in checkpoints)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_thirty_kills_lose_nothing(corpus: str, undisturbed: list[tuple], tmp_path: Path, seed: int) -> None:
    survives(tmp_path, corpus, undisturbed, seed, in_background=seed % 2 == 0)
