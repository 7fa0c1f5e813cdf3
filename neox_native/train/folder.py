"""The run's folder: whose it is, and the settings that reproduce it."""

from __future__ import annotations

import os
from pathlib import Path

from neox_native.checkpoint.agree import Ranks
from neox_native.config.check import incompatible
from neox_native.config.load import dump, load
from neox_native.config.schema import Config
from neox_native.errors import UserError


def open_run_folder(config: Config, ranks: Ranks) -> Path:
    """Make `run.dir` ready and write the resolved settings there; a collective over all ranks.

    With `checkpoint.resume = "none"`, checkpoints of an earlier run are set aside, so that a later "auto" cannot
    continue the wrong one.

    Raises:
        UserError: on all ranks, where a run with incompatible settings lives in the folder or it cannot be written.
    """
    folder = Path(config.run.dir)
    with ranks.together(f"Opening the run's folder run.dir = {config.run.dir!r}"):
        if ranks.rank == 0:
            _prepare(folder, config)
    return folder


def _prepare(folder: Path, config: Config) -> None:
    settings, checkpoints = folder / "config.toml", folder / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    if config.checkpoint.resume == "none" and checkpoints.exists():
        number = sum(1 for _ in folder.glob("checkpoints.before-*"))
        checkpoints.rename(folder / f"checkpoints.before-{number + 1}")
    elif config.checkpoint.resume == "auto" and settings.exists() and any(checkpoints.glob("step_*")):
        if found := incompatible(load(settings), config):
            raise UserError(" ".join(found))
    temporary = settings.with_suffix(".tmp")
    with open(temporary, "w") as file:
        file.write(dump(config))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(settings)
