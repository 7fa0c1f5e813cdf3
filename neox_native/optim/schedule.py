"""The learning rate of a step.

[Note: GPT-NeoX's schedule] Update number k has the rate that GPT-NeoX gives it: the schedule at n = k - 1, the updates
made before it, so that with warmup the first update has rate zero. Cosine ends at `min_lr`; linear and exponential fall as
if there were none and stop at it. A step that overflows in fp16 makes no update and takes no rate. One thing differs on
purpose: after its end GPT-NeoX's cosine rises again, and ours stays.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neox_native.config.schema import LrSchedule

EXPONENT = 0.693
"""The exponential decay falls by exp(-0.693), about one half, over the decay."""


def learning_rate(update: int, schedule: LrSchedule, peak_lr: float, total_steps: int) -> float:
    """Learning rate of update number `update`, counted from 1. See [Note: GPT-NeoX's schedule].

    With n = update - 1, T = decay_steps (or `total_steps`) and w = warmup_fraction * T: linear from 0 at n = 0 to
    `peak_lr` at n = w, then the shape `schedule.kind` until n = T, never below `min_lr`. "exponential" and "inverse_sqrt"
    go on falling after T.

    Raises:
        ValueError: unknown kind.
    """
    done = update - 1
    decay_steps = schedule.decay_steps or total_steps
    warmup_steps = schedule.warmup_fraction * decay_steps
    if warmup_steps > 0 and done <= warmup_steps:
        return peak_lr * done / warmup_steps
    return max(schedule.min_lr, _decayed(done, schedule, peak_lr, decay_steps, warmup_steps))


def _decayed(done: int, schedule: LrSchedule, peak_lr: float, decay_steps: int, warmup_steps: float) -> float:
    """The rate after warmup, before `min_lr` stops it."""
    progress = (done - warmup_steps) / (decay_steps - warmup_steps) if warmup_steps < decay_steps else 1.0
    above_floor = peak_lr - schedule.min_lr
    if schedule.kind == "constant":
        return peak_lr
    if schedule.kind == "cosine":
        return schedule.min_lr + above_floor / 2 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    if schedule.kind == "linear":
        return peak_lr * (1.0 - progress)
    if schedule.kind == "exponential":
        return peak_lr * math.exp(-EXPONENT * progress)
    if schedule.kind == "inverse_sqrt":
        return peak_lr * math.sqrt(max(1.0, warmup_steps) / max(1, done))
    if schedule.kind == "wsd":  # warmup, stable, decay (Hu et al. 2024)
        cooldown_steps = schedule.cooldown_fraction * decay_steps
        left = min(1.0, max(0.0, decay_steps - done) / cooldown_steps) if cooldown_steps else 1.0
        return schedule.min_lr + above_floor * left
    raise ValueError(f"unknown learning rate schedule {schedule.kind!r}")


class Rates:
    """The learning rate of each step of a run.

    Args:
        overflows: fp16: how many steps have overflowed, a scalar on the device. The rate then is one, too: the step's
            number less the overflows picks it from a table, without a word to the host.
    """

    def __init__(self, schedule: LrSchedule, peak_lr: float, total_steps: int, overflows: Tensor | None = None):
        self.arguments, self.overflows = (schedule, peak_lr, total_steps), overflows
        if overflows is not None:
            rates = [learning_rate(update, *self.arguments) for update in range(1, total_steps + 1)]
            self.table = torch.tensor(rates, dtype=torch.float32, device=overflows.device)

    def __call__(self, step: int) -> float | Tensor:
        """Rate of step number `step`, counted from 1."""
        if self.overflows is None:
            return learning_rate(step, *self.arguments)
        return self.table.take(step - 1 - self.overflows)
