"""Which steps to save and which checkpoints to keep: arithmetic only, no files, no ranks."""

from __future__ import annotations

from neox_native.config.schema import Checkpoint

PYTHIA_DENSE_STEPS = frozenset([0] + [2**k for k in range(10)])
"""Steps 0, 1, 2, 4, ... 512 (Biderman et al. 2023, section 2.1); every 1000th step follows."""


def should_save(step: int, config: Checkpoint, total_steps: int) -> bool:
    """Whether to save after `step` updates (0: before the first). The last step is always saved."""
    if step == total_steps:
        return True
    if config.save_every > 0 and step > 0 and step % config.save_every == 0:
        return True
    if config.save_steps == "pythia":
        return step in PYTHIA_DENSE_STEPS or step % 1000 == 0
    return bool(config.save_steps) and step in config.save_steps


def to_delete(saved_steps: list[int], keep_last: int, keep_every: int) -> list[int]:
    """Steps whose checkpoints may go, oldest first, given the steps of all complete ones.

    The newest `keep_last` stay (0: all stay), multiples of `keep_every` stay (0: no such rule), and the newest always
    stays.
    """
    if keep_last <= 0:
        return []
    steps = sorted(set(saved_steps))
    old = steps[: max(0, len(steps) - keep_last)]
    return [step for step in old if keep_every <= 0 or step % keep_every != 0]
