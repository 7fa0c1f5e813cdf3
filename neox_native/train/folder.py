"""The run's folder: whose it is, and the settings that reproduce the run."""

from __future__ import annotations

import json
import math
import os
import re
import socket
from dataclasses import replace
from pathlib import Path

from neox_native.checkpoint import files
from neox_native.checkpoint.agree import Ranks
from neox_native.checkpoint.resume import tidy
from neox_native.config.load import dump
from neox_native.config.schema import Config
from neox_native.durable import Lock, make_folder, replacing, sync_folder
from neox_native.errors import UserError
from neox_native.mesh import Launch
from neox_native.plain_files import read_text

OF_A_RUN = ("checkpoints", "hugging_face", "weights", "metrics.jsonl", "events.jsonl", "tensorboard")
BEGUN = ".begun"
"""Which job began where: what tells a restart of it that the run was set on its way."""


class RunFolder:
    """`run.dir`, held by this job alone until its processes end. Making one is a collective over all ranks.

    Until `begin`, nothing of an existing run changes but the owner's name in `.lock`, so that a command that is refused
    leaves no trace.

    Raises:
        UserError: on all ranks, where the folder cannot be made or another job is writing to it.
    """

    def __init__(self, config: Config, ranks: Ranks):
        self.config, self.ranks, self.path = config, ranks, Path(config.run.dir)
        with ranks.together(f"Opening run.dir = {config.run.dir!r}"):
            if ranks.rank == 0:
                make_folder(self.path)
                self._lock()

    def _lock(self) -> None:
        """Take the lock that the system gives back when this process ends, however it ends."""
        try:
            self.lock = Lock(self.path / ".lock")
        except BlockingIOError:
            owner = read_text(self.path / ".lock").strip()[:100] or "another process"
            raise UserError(f"run.dir = {str(self.path)!r} is in use by {owner}; choose another run.dir.") from None
        if self.lock.refusal:
            print(f"run.dir = {str(self.path)!r} cannot be locked ({self.lock.refusal}): start one run at a time in it", flush=True)
        self.lock.write(f"process {os.getpid()} on host {socket.gethostname()}")

    def begin(self, resume: str, step: int) -> None:
        """The run is possible and starts at `step`: set aside what it must not mix with, clear away what killed processes
        left, and write the resolved settings, which go on with it where it stands.

        Args:
            resume: `checkpoint.resume` as it holds for this start.
        """
        with self.ranks.together(f"Setting the earlier run in {self.path} aside"):
            if self.ranks.rank == 0:
                self._set_aside(self._abandoned(resume, step))
        goes_on = replace(self.config, checkpoint=replace(self.config.checkpoint, resume="auto"))
        with self.ranks.together(f"Writing to run.dir = {str(self.path)!r}"):
            if self.ranks.rank == 0:
                tidy(self.path)
                _replace(self.path / "config.toml", dump(goes_on))
                _replace(self.path / BEGUN, _name_of_start(self.config))

    def _abandoned(self, resume: str, step: int) -> list[Path]:
        """What an earlier run left that this start turns away from.

        With "none", all of it. With the path of a checkpoint, the checkpoints and exports after it, and all where it is not
        one of this folder's: a restart goes on at the newest, which must be of this run, and writes the exports that it misses.
        """
        if resume == "auto":
            return []
        if resume == "none":
            return [self.path / name for name in OF_A_RUN if (self.path / name).exists()]
        checkpoints = self.path / "checkpoints"
        kept = step if Path(resume).resolve().parent == checkpoints.resolve() else -1
        found = files.finished(checkpoints) + files.finished(self.path / "hugging_face")
        exported = [self.path / "weights"] if self._step_of_weights() > kept else []
        return [path for path in found if (files.step_of(path) or 0) > kept] + exported

    def _step_of_weights(self) -> float:
        """Step of the weights that were exported last; -1 where there are none, infinity where they do not tell."""
        if not (self.path / "weights").is_dir():
            return -1
        try:
            return int(files.read_metadata(self.path / "weights")["step"])
        except (UserError, OSError, ValueError, KeyError, TypeError):
            return math.inf

    def _set_aside(self, abandoned: list[Path]) -> None:
        """Move what is abandoned to `before-N`."""
        if not abandoned:
            return
        numbers = [int(found[1]) for path in self.path.iterdir() if (found := re.fullmatch(r"before-(\d+)", path.name))]
        aside = self.path / f"before-{max(numbers, default=0) + 1}"
        for path in abandoned:
            moved = aside / path.relative_to(self.path)
            make_folder(moved.parent)
            path.rename(moved)
            sync_folder(moved.parent)
            sync_folder(path.parent)
        print(f"set aside in {aside}: {', '.join(path.name for path in abandoned)}", flush=True)


def has_begun(config: Config) -> bool:
    """Whether this job, restarted since, has begun its run: whether the folder's newest state is its own.

    One that named a checkpoint and has none of its own yet has nothing to go on with.
    """
    folder = Path(config.run.dir)
    try:
        begun = read_text(folder / BEGUN) == _name_of_start(config)
    except UserError:
        return False
    return begun and (config.checkpoint.resume == "none" or bool(files.finished(folder / "checkpoints")))


def _name_of_start(config: Config) -> str:
    return json.dumps({"job": Launch.from_environment().job, "resume": config.checkpoint.resume}) + "\n"


def _replace(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
