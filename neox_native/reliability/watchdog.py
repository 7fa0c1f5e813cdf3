"""Hangs: a watchdog that says which rank is where and ends the job, and the flight recorder of collectives.

[Note: watchdog] Ranks that wait for each other hang together, so a rank need only watch itself. When its main thread makes
no progress for too long, its watchdog thread raises an alarm in the launcher's key-value store, which answers while
collectives hang. Every rank's thread sees the alarm and posts where its main thread is, with its Python stacks. After a
moment the lowest rank that is alive prints the table; a rank that posted nothing is stopped, dead, or stuck outside Python,
and is named first. Then all processes leave with `EXIT_STATUS`, and torchrun restarts the job.

A stopped rank cannot watch itself, and those that wait for it may be in a phase that takes long. So each watchdog counts in
the store that it is awake, and the rank before it looks whether it still counts. A watchdog that was late itself (Ctrl-Z, a
laptop that slept, a store that did not answer) was away; what it did not see does not count.

A rank that ends for a reason that all should hear of (it ran out of memory) tells it in the store. The others lose their
peer, or, where a GPU's collective waits for ever, their watchdogs end them after a moment; all with the same sentence.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from neox_native.config.schema import Run
from neox_native.errors import UserError, report_user_errors

EXIT_STATUS = 75
"""os.EX_TEMPFAIL: trying again may help."""
GRACE_SECONDS = 5.0
"""How long the ranks have to answer an alarm."""
SILENCE_SECONDS = 300.0
"""A watchdog that has not run for so long is a stopped process. Drawing a long order of samples keeps one waiting for minutes."""
FLIGHT_RECORDER = "flight_recorder"
"""Name of the folder, in the run's, for the last collectives of a run that hung."""
ALARM = "alarm"
TOLD = "told"
"""Key of the sentence with which all ranks end."""
LEFT = 1 << 40
"""Added to the count of a watchdog that was closed in good order."""


def job_store() -> dist.Store:
    """A connection of our own to the job's key-value store, so that a call that waits there does not stop the watchdog.
    The only user of this private function of torch."""
    return dist.distributed_c10d._get_default_store().clone()


def enable_flight_recorder(folder: Path) -> None:
    """Let torch record the last collectives of each rank, and NCCL write them to `folder`, once it is there, when one times out.

    Call before the process group is made; variables that the user has set stay.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{folder.absolute()}/nccl_timeout_rank_")


def dump_flight_recorder(folder: Path, rank: int) -> Path | None:
    """Write this rank's last collectives as JSON; None where none were recorded. NCCL and gloo keep a book each."""
    library = torch._C._distributed_c10d
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        recorded = getattr(library, name, lambda: b"{}")()
        if json.loads(recorded).get("entries"):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"collectives_rank_{rank}.json"
            path.write_bytes(recorded if isinstance(recorded, bytes) else recorded.encode())
            return path
    return None


@dataclass(frozen=True)
class Position:
    """Where a rank's main thread is."""

    rank: int
    host: str
    step: int
    phase: str
    microbatch: int
    idle_seconds: float
    stacks: str


def python_stacks(but: int) -> str:
    """The stacks of this process's threads, innermost call last, without the thread `but`."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)).rstrip()
        for ident, frame in sys._current_frames().items()
        if ident != but
    )


def report_hang(positions: list[Position], world_size: int) -> str:
    """The table of positions, those furthest behind first, then each distinct stack with the ranks that share it."""
    silent = sorted(set(range(world_size)) - {position.rank for position in positions})
    lines = ["No progress: the job hangs. Where the ranks are, furthest behind first:"]
    if silent:
        lines.append(f"  ranks {silent}: no answer (stopped, dead, or stuck outside Python)")
    behind = sorted(positions, key=lambda at: (at.step, at.microbatch, -at.idle_seconds, at.rank))
    for at in behind:
        lines.append(
            f"  rank {at.rank} ({at.host}): step {at.step}, {at.phase}, microbatch {at.microbatch}, "
            f"no progress for {at.idle_seconds:.0f} s"
        )
    shared: dict[str, list[int]] = {}
    for at in behind:
        shared.setdefault(at.stacks, []).append(at.rank)
    for stacks, ranks in shared.items():
        lines += [f"ranks {sorted(ranks)} are at:", stacks]
    return "\n".join(lines)


class Watchdog:
    """Watches this rank's main thread from a thread of its own, see [Note: watchdog].

    Args:
        run: the [run] section; `watchdog_factor` 0 switches the watchdog off.
        rank, world_size: of the job.
        folder: takes the flight recorder's files.
        store: of the job; `job_store()`.
        report: takes the table, on one rank.
        poll_seconds: how often it looks.
        clock: seconds, from any moment on.
    """

    def __init__(
        self,
        run: Run,
        rank: int,
        world_size: int,
        folder: Path,
        store: dist.Store,
        report: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
        poll_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run, self.rank, self.world_size, self.folder = run, rank, world_size, folder
        self._store, self._report, self._poll_seconds = dist.PrefixStore("watchdog", store), report, poll_seconds
        self._clock, self._looked, self._away_seconds = clock, clock(), 0.0
        self._step, self._phase, self._microbatch, self._since = 0, "start", 0, self._now()
        self._neighbours_count, self._counted = 0, self._now()
        self._step_seconds: deque[float] = deque(maxlen=100)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if run.watchdog_factor > 0:
            self._thread.start()

    def at(self, step: int, phase: str) -> None:
        """The main thread has come this far. Costs an assignment; call it as often as there is something to say.

        "train" is the phase that `watchdog_factor` limits; any other ("open data", "evaluate", "save") may take
        `watchdog_startup_seconds`.
        """
        self._step, self._phase, self._microbatch, self._since = step, phase, 0, self._now()

    def microbatch(self, number: int) -> None:
        """The main thread begins a microbatch of the present step and phase."""
        self._microbatch, self._since = number, self._now()

    def measured(self, step_seconds: float) -> None:
        """Learn how long steps take, from logged steps: the device's time, where `at` sees the host's."""
        self._step_seconds.append(step_seconds)

    def limit_seconds(self) -> float:
        """How long the present phase may take without progress."""
        if self._phase != "train" or not self._step_seconds:
            return self.run.watchdog_startup_seconds
        return max(self.run.watchdog_min_seconds, self.run.watchdog_factor * statistics.median(self._step_seconds))

    def end(self) -> None:
        """What the main thread does last begins, which is no training step. Keeps where it was."""
        self._phase, self._since = f"end of {self._phase}", self._now()

    @property
    def step(self) -> int:
        """The step that the main thread is in, or was when its work ended."""
        return self._step

    def where(self) -> str:
        """Where the main thread is, or was when its work ended, in words."""
        return f"step {self._step}, {self._phase.removeprefix('end of ')}, microbatch {self._microbatch}"

    def tell(self, why: str) -> str:
        """This rank ends with a sentence that all ranks should end with: this one, or that of the rank that was first."""
        try:
            if self._store.add("telling", 1) == 1:
                self._store.set(TOLD, why)
            self._store.wait([TOLD], timedelta(seconds=GRACE_SECONDS))
            return self._store.get(TOLD).decode()
        except dist.DistError:
            return why

    def told(self) -> str:
        """What a rank has told; "" where none has."""
        try:
            return self._store.get(TOLD).decode() if self._store.check([TOLD]) else ""
        except dist.DistError:  # its host is gone
            return ""

    def close(self) -> None:
        """Stop watching. Does not wait for a store that does not answer, as that of a torchrun that Ctrl-Z has stopped."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(GRACE_SECONDS)

    def _watch(self) -> None:
        while not self._stop.wait(self._poll_seconds):
            if self.look():
                try:
                    self._end_job()
                except Exception:
                    self._report(f"{traceback.format_exc()}{report_hang([self._position()], self.world_size)}")
                finally:
                    os._exit(EXIT_STATUS)
            if (why := self.told()) and not self._stop.wait(GRACE_SECONDS):  # it waits for a rank that has ended
                with contextlib.suppress(SystemExit), report_user_errors():
                    raise UserError(why)
                os._exit(1)
        with contextlib.suppress(dist.DistError):  # nobody is left to ask
            self._store.add(f"awake/{self.rank}", LEFT)

    def look(self) -> bool:
        """Whether the job hangs, as far as this rank can tell or another has told it."""
        now = self._clock()
        late = now - self._looked - self._poll_seconds
        if late > self._poll_seconds:
            self._away_seconds += late
        self._looked, now = now, now - self._away_seconds
        self._since = min(self._since, now)  # the main thread may have been back first
        hangs = now - self._since > self.limit_seconds()
        try:
            if hangs or self._neighbour_is_silent(now):
                self._store.set(ALARM, str(self.rank))
                return True
            return self._store.check([ALARM])
        except dist.DistError:  # its host is gone: this rank learns of a hang from itself alone
            return hangs

    def _neighbour_is_silent(self, now: float) -> bool:
        self._store.add(f"awake/{self.rank}", 1)
        count = self._store.add(f"awake/{(self.rank + 1) % self.world_size}", 0)
        if count != self._neighbours_count:
            self._neighbours_count, self._counted = count, now
        return count < LEFT and now - self._counted > SILENCE_SECONDS

    def _now(self) -> float:
        """A clock that stood still while this process did."""
        return self._clock() - self._away_seconds

    def _position(self) -> Position:
        return Position(
            self.rank, socket.gethostname(), self._step, self._phase, self._microbatch,
            self._now() - self._since, python_stacks(but=threading.get_ident()),
        )

    def _end_job(self) -> None:
        """Post where this rank is and let one rank print the table; the main thread cannot."""
        self._store.set(f"position/{self.rank}", json.dumps(asdict(self._position())))
        dump = dump_flight_recorder(self.folder, self.rank)
        deadline = time.monotonic() + GRACE_SECONDS
        positions: dict[int, Position] = {}
        while len(positions) < self.world_size and time.monotonic() < deadline:
            for rank in set(range(self.world_size)) - set(positions):
                if self._store.check([f"position/{rank}"]):
                    positions[rank] = Position(**json.loads(self._store.get(f"position/{rank}")))
            time.sleep(min(0.1, self._poll_seconds))
        if self.rank == min(positions):
            self._report(report_hang(list(positions.values()), self.world_size))
            if dump is not None:
                self._report(f"The last collectives of each rank are in {dump.parent}.")
            self._store.set("reported", "")
        # Who leaves before the report breaks the reporter's collective, and its main thread might end it with an error.
        while self.rank != min(positions) and time.monotonic() < deadline and not self._store.check(["reported"]):
            time.sleep(min(0.1, self._poll_seconds))
        # Whoever holds the store leaves last, or the others could not read it to the end.
        self._store.set(f"left/{self.rank}", "")
        while self.rank == 0 and time.monotonic() < deadline:
            if self._store.check([f"left/{rank}" for rank in positions]):
                break
            time.sleep(min(0.1, self._poll_seconds))
