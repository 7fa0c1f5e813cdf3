"""The run's folder: whose it is, and the settings that reproduce the run."""

from __future__ import annotations

import fcntl
import os
import re
import socket
from dataclasses import replace
from pathlib import Path

from neox_native.checkpoint.agree import Ranks
from neox_native.config.load import dump
from neox_native.config.schema import Config
from neox_native.errors import UserError

OF_A_RUN = ("checkpoints", "metrics.jsonl", "events.jsonl", "tensorboard")


class RunFolder:
    """`run.dir`, held by this job alone until its processes end. Making one is a collective over all ranks.

    Nothing in an existing folder changes before `begin`, so that a command that is refused leaves no trace.

    Raises:
        UserError: on all ranks, where the folder cannot be made or another job is writing to it.
    """

    def __init__(self, config: Config, ranks: Ranks):
        self.config, self.ranks, self.path = config, ranks, Path(config.run.dir)
        with ranks.together(f"Opening run.dir = {config.run.dir!r}"):
            if ranks.rank == 0:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock()

    def _lock(self) -> None:
        """Take the lock that the system gives back when this process ends, however it ends."""
        self.lock = open(self.path / ".lock", "a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.seek(0)
            owner = self.lock.read().strip() or "another process"
            raise UserError(f"run.dir = {str(self.path)!r} is in use by {owner}; choose another run.dir.") from None
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on host {socket.gethostname()}")
        self.lock.flush()

    def set_aside(self) -> None:
        """For `checkpoint.resume = "none"`: move what an earlier run left to `before-N`, so that the two do not mix."""
        with self.ranks.together(f"Setting the earlier run in {self.path} aside"):
            if self.ranks.rank == 0 and any((self.path / name).exists() for name in OF_A_RUN):
                numbers = [int(found[1]) for path in self.path.iterdir() if (found := re.fullmatch(r"before-(\d+)", path.name))]
                aside = self.path / f"before-{max(numbers, default=0) + 1}"
                aside.mkdir()
                for name in OF_A_RUN:
                    if (self.path / name).exists():
                        (self.path / name).rename(aside / name)

    def begin(self) -> None:
        """The run is possible: write the resolved settings, which go on with it where it stands."""
        goes_on = replace(self.config, checkpoint=replace(self.config.checkpoint, resume="auto"))
        settings = self.path / "config.toml"
        with self.ranks.together(f"Writing {settings}"):
            if self.ranks.rank == 0:
                temporary = settings.with_suffix(".tmp")
                with open(temporary, "w") as file:
                    file.write(dump(goes_on))
                    file.flush()
                    os.fsync(file.fileno())
                temporary.rename(settings)
