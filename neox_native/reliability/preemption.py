"""Leaving: a signal asks for it or the launcher is gone; all ranks finish the same step and save; every process ends.

[Note: leaving] A rank that waits in a collective or at the key-value store runs no Python, so a handler in Python would wait
with it. A thread therefore hears the requests, from a pipe into which Python's own C handler puts the signal's number. What
it does about one depends on when it comes:

- before the first step is done there is nothing to save, and the process ends at once with a sentence;
- from then on it is noted, the all-reduce that goes with each step tells all ranks, and they save and leave together;
- a second one ends the process at once; the last checkpoint stands.

Where torchrun's nodes are many, SIGTERM to one of them means that node. The others save and leave with it, as their
collectives need it, but with `EXIT_STATUS`: their torchruns start them again, on what is left.

When the work is done, or has failed, the process has `END_SECONDS` left. Then the thread ends it: a collective that no
rank joins, or a file that cannot be closed, keeps nobody.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, TextIO

import torch
import torch.distributed as dist

from neox_native.errors import open_standard_streams
from neox_native.launch import Launch, Ranks
from neox_native.reliability.watchdog import EXIT_STATUS, python_stacks

ANNOUNCEMENT = signal.SIGUSR1
"""`sbatch --signal=USR1@300` announces the end of a job's time: whatever comes after it is the first request."""
REQUESTS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
"""Ctrl-C, a closed terminal, a scheduler. torchrun, which keeps its ranks in sessions of their own, passes all three on."""
LAUNCHER_GONE = signal.NSIG
"""A number that no signal has: torchrun ended and left its ranks behind."""
OF_A_NODE = (signal.SIGTERM, LAUNCHER_GONE)
"""Requests that mean the node that heard them, not the whole job."""
SAME_SECONDS = 1.0
"""Requests closer than this are one: a scheduler tells both torchrun, which passes it on, and the ranks."""
END_SECONDS = 15.0
"""How long a process may take to end when its work is over. torchrun kills 30 s after it has passed a signal on."""
POLL_SECONDS = 0.5


def name_of(reason: int) -> str:
    """The signal's name, or what happened instead."""
    return "the end of torchrun" if reason == LAUNCHER_GONE else signal.Signals(reason).name


class Requests:
    """Hears requests to leave, from its making to the end of the process, see [Note: leaving].

    A signal that is ignored (by `nohup`, or in a script's background) stays so. Around a process's work, `with` bounds
    what may come after it.

    Args:
        launch: who may speak (local rank 0), and whether there is a torchrun to look for.
        end: ends the process with a status.
    """

    def __init__(
        self, launch: Launch, end: Callable[[int], None] = os._exit, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.reason = 0
        """The first request's number; 0 while there is none."""
        self._speaks, self._end, self._clock = launch.local_rank == 0, end, clock
        self._launcher = os.getppid() if launch.job else None
        self._step_done, self._deadline = False, float("inf")
        self._first, self._first_heard = 0, 0.0
        self._pipe, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        wanted = [number for number in (*REQUESTS, ANNOUNCEMENT) if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in wanted}
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        itself = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: (heard := itself()) and heard.close())  # a child's signals are its own
        self._listening = True
        self.thread = threading.Thread(target=self._listen, name="requests to leave", daemon=True)
        self.thread.start()

    def step_done(self) -> None:
        """From now on there is something to save."""
        self._step_done = True

    def end_within(self, seconds: float = END_SECONDS) -> None:
        """The work is over: this process ends in this time, in good order or with its stacks and `EXIT_STATUS`."""
        self._deadline = min(self._deadline, self._clock() + seconds)

    def hear(self, number: int) -> None:
        """Answer one request."""
        if not self._step_done:
            self._say(f"{name_of(number)} before the first step was done: leaving, as there is nothing to save.")
            self._end(0 if number == ANNOUNCEMENT else 128 + number)
        elif self._first in REQUESTS:
            if number in REQUESTS and self._clock() - self._first_heard > SAME_SECONDS:
                self._say(f"{name_of(number)} after {name_of(self._first)}: leaving at once. What is saved stands.")
                self._end(128 + number)
        elif number in REQUESTS or not self._first:
            self.reason = self._first = number
            self._first_heard = self._clock()
            self._say(f"{name_of(number)}: leaving after the next step, when the state is saved; another signal leaves at once.")

    def look(self) -> None:
        """Is the launcher still there, and is there time left to end?"""
        if self._launcher not in (None, os.getppid()):
            self._launcher = None
            self.hear(LAUNCHER_GONE)
        if self._clock() > self._deadline:
            stacks = python_stacks(but=threading.get_ident())
            print(f"The work is over, but this process does not end by itself:\n{stacks}", file=sys.stderr, flush=True)
            self._end(EXIT_STATUS)

    def close(self) -> None:
        """Give the signals back to whom they belonged."""
        if self._listening:
            self._listening = False
            signal.set_wakeup_fd(-1)
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            os.close(self._wakeup)  # which ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler in Python, often faster than the thread but never to be relied upon."""
        self.reason = self.reason or number

    def _say(self, sentence: str) -> None:
        if self._speaks:
            print(sentence, file=sys.stderr, flush=True)

    def _listen(self) -> None:
        pipe = select.poll()
        pipe.register(self._pipe, select.POLLIN)
        while self._listening:
            for number in os.read(self._pipe, 64) if pipe.poll(1000 * POLL_SECONDS) else b"":
                if number in self._previous:
                    self.hear(number)
            if self._listening:
                self.look()
        os.close(self._pipe)

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Who was asked to leave and lost its peers, because they left first, needs no traceback."""
        self.end_within()
        if self.reason and isinstance(error, RuntimeError) and ("gloo" in str(error) or isinstance(error, dist.DistError)):
            self._say(f"{name_of(self.reason)}: leaving at once, as other ranks have left. What is saved stands.")
            raise SystemExit(128 + self.reason) from None


class LeaveRequest:
    """Turns a request on any rank into the same decision on all ranks after the same step.

    A signal reaches the ranks at different moments, so one that acted alone would leave the others in a collective.
    Each step starts a tiny all-reduce on a process group of its own and reads the one that the step before started:
    it has long finished, so it costs no wait. Creating one is a collective.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.failed = False
        """Whether a rank has told `after_step` of a failure; known one step later, on all ranks alike."""
        self._told = torch.zeros(2, dtype=torch.int32)
        self._work: dist.Work | None = None

    def after_step(self, failed: bool = False) -> str | None:
        """What to leave for ("SIGTERM"), or None; call once per step, or batch of an evaluation, on every rank, which all get
        the same answer.

        A request is answered one step after the one during which it came, and so is `failed`: something on this rank
        went wrong beside the steps, and all ranks must hear of it (`self.failed`).
        """
        self._requests.step_done()
        told = torch.tensor([self._requests.reason, failed], dtype=torch.int32)
        if self._group is None:
            return self._answer(told)
        if self._work is not None:
            self._work.wait()
            if name := self._answer(self._told):
                return name
        self._told = told
        self._work = dist.all_reduce(self._told, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return None

    def goes_on(self, launch: Launch, ranks: Ranks) -> list[int]:
        """The nodes that were not asked to leave and whose launcher starts them again, see [Note: leaving]. A collective, for
        ranks that leave."""
        everyone = ranks.gather((launch.node, launch.restarts_left, self._requests.reason))
        asked = {node for node, _, reason in everyone if reason}
        if any(reason and reason not in OF_A_NODE for _, _, reason in everyone):
            return []
        return sorted({node for node, left, _ in everyone if left > 0} - asked)

    def _answer(self, told: torch.Tensor) -> str | None:
        reason, failed = told.tolist()
        self.failed = bool(failed)
        return name_of(reason) if reason else None


class Console:
    """A stream that outlives its reader: a closed terminal, or a `| tee log` that Ctrl-C has ended, costs no checkpoint."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's."""
        with self._reader_may_be_gone():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As the stream's."""
        with self._reader_may_be_gone():
            self._stream.flush()

    @contextlib.contextmanager
    def _reader_may_be_gone(self) -> Iterator[None]:
        """From then on the stream leads nowhere."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def end_of_process() -> Iterator[None]:
    """Do a process's work in the body, then end the process.

    Finalisation is left out: it would wait for threads that read ahead, and for collectives that no other rank joins.
    """
    status = 1
    open_standard_streams()
    sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr)  # type: ignore[assignment]
    try:
        yield
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
