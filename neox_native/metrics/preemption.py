"""Leaving in good order: a signal says that this machine will be taken away, and all ranks save at the same step."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""torchrun and Slurm send SIGTERM; `sbatch --signal=USR1@300` announces the end of a job's time."""


class LeaveRequest:
    """Turns a signal on any rank into the same decision on all ranks after the same step.

    A signal reaches the ranks at different moments, so one that acted alone would leave the others in a collective.
    Each step starts a tiny all-reduce on a process group of its own and reads the one that the step before started:
    it has long finished, so it costs no wait. Creating one is a collective.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._signal = 0
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        self.failed = False
        """Whether a rank has told `after_step` of a failure; known one step later, on all ranks alike."""
        self._told = torch.zeros(2, dtype=torch.int32)
        self._work: dist.Work | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def after_step(self, failed: bool = False) -> str | None:
        """Name of the signal to leave for, or None; call once per step on every rank, which all get the same answer.

        A signal is answered one step after the one during which it came, and so is `failed`: something on this rank went
        wrong beside the steps, and all ranks must hear of it (`self.failed`).
        """
        told = torch.tensor([self._signal, failed], dtype=torch.int32)
        if self._group is None:
            return self._answer(told)
        if self._work is not None:
            self._work.wait()
            if name := self._answer(self._told):
                return name
        self._told = told
        self._work = dist.all_reduce(self._told, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return None

    def _answer(self, told: torch.Tensor) -> str | None:
        number, failed = told.tolist()
        self.failed = bool(failed)
        return signal.Signals(number).name if number else None

    def close(self) -> None:
        """Give the signals back to whom they belonged."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
