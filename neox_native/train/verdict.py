"""What a checkpoint says of updates that were skipped, so that neither a row of them nor its end is forgotten by a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neox_native.checkpoint import files
from neox_native.config.schema import Config
from neox_native.errors import UserError
from neox_native.reliability.bad_steps import BadSteps
from neox_native.train.state import config_of

BAD_STEPS = "bad_steps_in_a_row"
"""Name in a checkpoint's metadata of what `BadSteps.count` was."""
SHAPE_THE_TRAINING = ("model", "data", "training", "optimizer", "lr_schedule")
"""Sections in which a change may lead a run out of its bad steps."""


def verdict(bad_steps: BadSteps, directory: Path, step: int) -> UserError | None:
    """What ends the run after `step`, naming the newest checkpoint in `directory` from before the bad steps."""
    if not bad_steps.verdict():
        return None
    older = [path for path in files.finished(directory) if (files.step_of(path) or 0) <= step - bad_steps.longest]
    return bad_steps.verdict(str(older[0]) if older else "")


def go_on(bad_steps: BadSteps, saved: dict[str, Any], config: Config, directory: Path) -> None:
    """Count bad steps on from a checkpoint's metadata, unless a setting of the training has changed since.

    Raises `UserError` where they had ended the run: on the same settings it would only end again.
    """
    before, count = config_of(saved), saved.get(BAD_STEPS)
    if not isinstance(count, int) or any(getattr(before, name) != getattr(config, name) for name in SHAPE_THE_TRAINING):
        return
    bad_steps.go_on_from(count)
    if found := verdict(bad_steps, directory, saved["step"]):
        raise found
