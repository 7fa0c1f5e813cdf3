"""Where the time of a few steps goes: a trace of each rank, and a table of its dearest kernels."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from neox_native.config.schema import Run
from neox_native.durable import disk_errors_named, make_folder, replacing, sweep, write_whole
from neox_native.errors import UserError

FOLDER = "profile"
"""Name of the folder, in the run's."""
ROWS = 40
"""Of the table."""


class Profile:
    """Watches the steps of `run.profile` on this rank; where it names none, it does nothing.

    The step before them warms the profiler up, where this start of the run takes that step: else the trace would begin with
    what a GPU's profiler does when it starts.

    Args:
        run: the [run] section.
        rank: names this rank's files.
    """

    def __init__(self, run: Run, rank: int, device: torch.device) -> None:
        self.steps, self.rank, self.folder = run.profiled_steps, rank, Path(run.dir) / FOLDER
        self.on_gpu = device.type == "cuda"
        self.profiler: profile | None = None
        self.seen: list[int] = []

    def begin(self, step: int) -> None:
        """Call before each step."""
        self.seen += [step] if step in self.steps else []
        if self.profiler is not None:
            self.profiler.step()
        elif step in self.steps or step + 1 in self.steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
            self.profiler = profile(activities=activities, schedule=self._action, acc_events=True)
            self.profiler.step_num, self.profiler.current_action = step, self._action(step)  # the trace has the run's numbers
            self.profiler.start()

    def is_due(self, step: int, leaving: bool) -> bool:
        """Whether to `write` after a step; `leaving`: it is the last one of this start."""
        return bool(self.seen) and self.profiler is not None and (leaving or step == self.steps[-1])

    def write(self) -> str:
        """Stop, and write this rank's files; returns in words what came of it. A disk that refuses ends no run. A collective,
        beside which no other thread communicates."""
        assert self.profiler is not None
        profiler, self.profiler = self.profiler, None
        _settle()
        profiler.stop()
        averages = profiler.key_averages()
        name = f"steps_{self.seen[0]}-{self.seen[-1]}_rank_{self.rank}"
        try:
            with disk_errors_named(self.folder):
                make_folder(self.folder)
                sweep(self.folder, f"steps_*_rank_{self.rank}.*")
                write_whole(self.folder / f"{name}.txt", self._table(averages).encode())
                with tempfile.TemporaryDirectory() as plain:
                    profiler.export_chrome_trace(f"{plain}/trace.json")
                    with open(f"{plain}/trace.json", "rb") as trace, replacing(self.folder / f"{name}.pt.trace.json.gz") as file:
                        with gzip.GzipFile("", "wb", 5, file) as packed:
                            shutil.copyfileobj(trace, packed)
        except UserError as error:
            told = f"rank {self.rank}: the profile of steps {self.seen[0]} to {self.seen[-1]} is lost: {error}"
            if self.rank:
                print(told, flush=True)  # nobody else tells it
            return told
        return f"profiled steps {self.seen[0]} to {self.seen[-1]}: {self.folder}; the dearest: {self._dearest(averages)}"

    def _action(self, step: int) -> ProfilerAction:
        return ProfilerAction.RECORD if step in self.steps else ProfilerAction.WARMUP

    def _table(self, averages: EventList) -> str:
        by = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        return averages.table(sort_by=by, row_limit=ROWS, max_name_column_width=100)

    def _dearest(self, averages: EventList) -> str:
        """The three kernels (a CPU's: operations) that took most, with their shares of all kernels' time."""
        wanted = DeviceType.CUDA if self.on_gpu else DeviceType.CPU
        took = {
            each.key: each.self_device_time_total if self.on_gpu else each.self_cpu_time_total
            for each in averages
            if each.device_type == wanted and not each.is_user_annotation
        }
        dearest = sorted(took, key=lambda key: -took[key])[:3]
        return ", ".join(f"{key[:60]} {took[key] / max(sum(took.values()), 1e-9):.0%}" for key in dearest) or "none was seen"


def _settle() -> None:
    """Wait for the collectives of gloo that are on their way: one that ends when the profiler has stopped writes its time into
    memory that is freed (torch 2.13), which ended one run in four. gloo's barrier waits for all that its group began before."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if dist.get_backend(group) == "gloo":
            dist.barrier(group=group)
