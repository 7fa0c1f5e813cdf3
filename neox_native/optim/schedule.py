"""The learning rate of a step. Pure arithmetic."""

from __future__ import annotations

import math

from neox_native.config.schema import LrSchedule

EXPONENT = 0.693
"""GPT-NeoX's exponential decay falls by exp(-0.693), about one half, over the decay."""


def learning_rate(step: int, schedule: LrSchedule, peak_lr: float, total_steps: int) -> float:
    """Learning rate of update number `step`, counted from 1.

    With T = decay_steps (or `total_steps`) and w = warmup_fraction * T: linear from 0 to `peak_lr` over the first w
    steps, then the shape `schedule.kind`, never below `min_lr`, and constant after step T (except "inverse_sqrt", which
    has no end). As in GPT-NeoX, which forgets to stop at T.

    Raises:
        ValueError: unknown kind.
    """
    decay_steps = schedule.decay_steps or total_steps
    warmup_steps = schedule.warmup_fraction * decay_steps
    if step <= warmup_steps:
        return peak_lr * step / warmup_steps
    if schedule.kind == "inverse_sqrt":
        return max(schedule.min_lr, peak_lr * math.sqrt(max(1.0, warmup_steps) / step))
    if schedule.kind == "constant":
        return peak_lr
    progress = min(1.0, (step - warmup_steps) / max(1.0, decay_steps - warmup_steps))
    if schedule.kind == "exponential":
        return max(schedule.min_lr, peak_lr * math.exp(-EXPONENT * progress))
    return schedule.min_lr + (peak_lr - schedule.min_lr) * _share_left(step, progress, schedule, decay_steps)


def _share_left(step: int, progress: float, schedule: LrSchedule, decay_steps: int) -> float:
    """How much of the way between `min_lr` and the peak is left after a share `progress` of the decay."""
    if schedule.kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule.kind == "linear":
        return 1.0 - progress
    if schedule.kind == "wsd":  # warmup, stable, decay (Hu et al. 2024)
        cooldown_steps = schedule.cooldown_fraction * decay_steps
        return min(1.0, max(0.0, decay_steps - step) / cooldown_steps) if cooldown_steps else 1.0
    raise ValueError(f"unknown learning rate schedule {schedule.kind!r}")
