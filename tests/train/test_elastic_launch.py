"""A run whose nodes leave and come, under `torchrun --nnodes 1:2`: it goes on with what is left, and its numbers stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from neox_native.config.load import dump
from tests.checkpoint.small_runs import run, settings, write_corpus
from tests.ranks import children_of
from tests.train.same_run import assert_same_run

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
CHANGES = [
    "--run.determinism=elastic", f"--training.steps={STEPS}", "--training.global_batch_size=32", "--checkpoint.save_every=5",
    "--checkpoint.keep_last=2", "--evaluation.every=10", "--evaluation.batches=1", "--data.split=80,20,0",
]  # fmt: skip
QUICK = "is_host=0,keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1,join_timeout=120"


class Nodes:
    """Node agents of two ranks each on this machine, over a store of the test's own; what they write is one stream."""

    def __init__(self, folder: Path, *changes: str) -> None:
        self.folder, self.output = folder / "run", ""
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (folder / "settings.toml").write_text(dump(settings(write_corpus(folder), self.folder, *CHANGES, *changes)))
        self.settings = folder / "settings.toml"
        self.agents: list[subprocess.Popen] = []
        reader, self.writer = os.pipe()
        self.seen, self.grown = 0, threading.Condition()
        self.reading = threading.Thread(target=self._read, args=(reader,))
        self.reading.start()

    def start(self) -> subprocess.Popen:
        """One more node."""
        command = [
            sys.executable, "-u", "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=2", "--max-restarts=5",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.store.port}", f"--rdzv-conf={QUICK}", "--rdzv-id=test",
            "--local-addr=127.0.0.1", "train.py", f"--config={self.settings}",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.agents.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self.writer, stderr=self.writer))
        return self.agents[-1]

    def read_until(self, *texts: str) -> None:
        """Wait until each of the texts has been written since the last call, in any order."""
        with self.grown:
            found = self.grown.wait_for(lambda: all(text in self.output[self.seen :] for text in texts), timeout=120)
            assert found, self.output
            self.seen = max(self.output.index(text, self.seen) + len(text) for text in texts)

    def _read(self, reader: int) -> None:
        with os.fdopen(reader, errors="replace") as lines:
            for line in lines:
                with self.grown:
                    self.output += line
                    self.grown.notify()

    def lose(self, agent: subprocess.Popen) -> None:
        """The node's power fails: nothing of it gets to do anything."""
        agent.send_signal(signal.SIGSTOP)
        for rank in children_of(agent):
            os.kill(rank, signal.SIGKILL)
        agent.kill()
        agent.wait()

    def close(self) -> None:
        """Nothing of the run stays."""
        for agent in self.agents:
            agent.kill()
            agent.wait()
        os.close(self.writer)
        self.reading.join()


@pytest.fixture
def nodes(tmp_path: Path):
    """Starts nodes, and sees to it that nothing of them stays."""
    made: list[Nodes] = []

    def make(*changes: str) -> Nodes:
        made.append(Nodes(tmp_path, *changes))
        return made[-1]

    yield make
    for each in made:
        each.close()
        print(each.output)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lost", "asked to leave"])
def test_a_run_goes_on_without_a_node_and_with_another(nodes, tmp_path: Path, how: str) -> None:
    alone = tmp_path / "alone"
    job = nodes(*(["--checkpoint.resume=none"] if how == "asked to leave" else []))
    first, second = job.start(), job.start()
    job.read_until("on 4 ranks", "step  7/")
    if how == "lost":
        job.lose(first)
    else:
        first.send_signal(signal.SIGTERM)
    job.read_until("on 2 ranks", "dp was 4 and is now 2: each rank computes 16 of a step's 32 microbatches instead of 8; the numbers stay the same")
    third = job.start()
    job.read_until("on 4 ranks", "dp was 2 and is now 4: each rank computes 8 of a step's 32 microbatches instead of 16; the numbers stay the same")
    assert second.wait() == 0 and third.wait() == 0
    run(settings(str(tmp_path / "corpus"), alone, *CHANGES, "--parallel.dp=1"))
    assert_same_run(job.folder, alone, STEPS)
