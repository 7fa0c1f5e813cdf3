"""The run's folder: whose it is, and the settings that reproduce the run."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from neox_native.checkpoint import files
from neox_native.checkpoint.resume import tidy
from neox_native.config.schema import Config
from neox_native.durable import Lock, make_folder, move, write_whole
from neox_native.errors import UserError
from neox_native.launch import Launch, Ranks
from neox_native.metrics.writers import check_logs, mend_logs
from neox_native.plain_files import read_text
from neox_native.train.provenance import EARLIER, SETTINGS_FILE, write_settings

OF_A_RUN = ("checkpoints", "hugging_face", "weights", "metrics.jsonl", "events.jsonl", "tensorboard", "profile")
LOCK = ".lock"
BEGUN = ".begun"
"""Which job began where: what tells a restart of it that the run was set on its way."""
LAUNCHERS = "launchers"
"""Name in that file of the launchers of the last start, one per node."""


class RunFolder:
    """`run.dir`, held by this job alone until its processes end. Making one is a collective over all ranks.

    Until `begin` nothing is made or changed, so that a command that is refused leaves no trace: a lock that is there is held,
    a missing one is made by `begin`.

    Raises:
        UserError: on all ranks, where the folder cannot be made or another job is writing to it.
    """

    def __init__(self, config: Config, ranks: Ranks):
        self.config, self.ranks, self.path = config, ranks, Path(config.run.dir)
        self.lock: Lock | None = None
        with ranks.together(f"Opening run.dir = {config.run.dir!r}"):
            if ranks.is_first:
                with suppress(FileNotFoundError):
                    self._hold(create=0)
                self._require_writable()

    def _require_writable(self) -> None:
        """Raise `PermissionError` where it is sure that nothing can be written, which a long start would find out too late."""
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))

    def _hold(self, create: int) -> None:
        """Take the lock that the system gives back when this process ends, however it ends."""
        try:
            self.lock = Lock(self.path / LOCK, create=create)
        except (BlockingIOError, FileExistsError):
            owner = read_text(self.path / LOCK).strip()[:100] or "none yet"
            raise UserError(
                f"run.dir = {str(self.path)!r} is in use by another command (the last one that began there: {owner}); "
                "choose another run.dir."
            ) from None
        if self.lock.refusal:
            print(f"run.dir = {str(self.path)!r} cannot be locked ({self.lock.refusal}): start one run at a time in it", flush=True)

    def begin(self, config: Config, step: int) -> list[str]:
        """Begin a run that is possible, at `step`: set aside what it must not mix with, clear away what killed processes left,
        and write settings that go on with it where it stands.

        Args:
            config: as it holds for this start.

        Returns:
            on rank 0, a line for each setting that has changed since the last start.
        """
        resume, changed = config.checkpoint.resume, list[str]()
        launchers = sorted(set(self.ranks.gather(Launch.from_environment().launcher)) - {""})
        goes_on = replace(config, checkpoint=replace(config.checkpoint, resume="auto"))
        with self.ranks.together(f"Writing to run.dir = {str(self.path)!r}"):
            if self.ranks.is_first:
                with self._made(logs_go_on=resume != "none"):
                    aside = self._set_aside(self._abandoned(resume, step))
                    tidy(self.path)
                    changed = write_settings(self.path, goes_on, step, aside if resume == "none" else None)
                    write_whole(self.path / BEGUN, (json.dumps(_start(self.config) | {LAUNCHERS: launchers}) + "\n").encode())
        return changed

    @contextmanager
    def _made(self, logs_go_on: bool) -> Iterator[None]:
        """Make the folder and its lock where they are missing. Whatever is new goes where the body fails."""
        files = [self.path / name for name in (LOCK, SETTINGS_FILE, BEGUN)]
        missing = [path for path in (*files, self.path, *self.path.parents) if not os.path.lexists(path)]
        try:
            if logs_go_on:
                check_logs(self.path)
            make_folder(self.path)
            if self.lock is None:
                self._hold(os.O_CREAT | os.O_EXCL)
            assert self.lock is not None
            self.lock.write(f"process {os.getpid()} on host {socket.gethostname()}")
            yield
        except BaseException:
            for path in missing:
                with suppress(OSError):  # as where a folder is not empty: it is somebody's by now
                    if path not in files:
                        path.rmdir()
                    elif self.lock is not None:
                        path.unlink()
            raise

    def needs_nothing(self, config: Config, step: int) -> bool:
        """Whether a start at `step`, the run's last, would turn away from nothing. Then there is no start, and this clears away
        what killed processes left. A collective."""
        idle = False
        with self.ranks.together(f"Looking at run.dir = {str(self.path)!r}"):
            if self.ranks.is_first:
                idle = not self._abandoned(config.checkpoint.resume, step)
                if idle and self.lock is not None:
                    tidy(self.path)
                    mend_logs(self.path, step)
        return bool(self.ranks.from_first(idle))

    def _abandoned(self, resume: str, step: int) -> list[Path]:
        """What an earlier run left that this start turns away from.

        With "none", that is all. With the path of a checkpoint, it is the checkpoints and exports after that one, or all where
        it is not one of this folder's: a restart goes on at the newest, which must be of this run.
        """
        if resume == "auto":
            return []
        if resume == "none":
            return [self.path / name for name in OF_A_RUN if (self.path / name).exists()] + sorted(self.path.glob(EARLIER))
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

    def _set_aside(self, abandoned: list[Path]) -> Path | None:
        """Move what is abandoned to `before-N`, which is returned."""
        if not abandoned:
            return None
        numbers = [int(found[1]) for path in self.path.iterdir() if (found := re.fullmatch(r"before-(\d+)", path.name))]
        aside = self.path / f"before-{max(numbers, default=0) + 1}"
        for path in abandoned:
            move(path, aside / path.relative_to(self.path))
        print(f"set aside in {aside}: {', '.join(path.name for path in abandoned)}", flush=True)
        return aside


def has_begun(config: Config, restarted: bool, launchers: set[str]) -> bool:
    """Whether this start is a restart, by its launcher, of a run that this job has begun: whether the folder's newest state is
    its own. Where a node has come or left, torchrun starts its ranks again without counting it as a restart.

    One that named a checkpoint and has none of its own yet has nothing to go on with.

    Args:
        restarted: whether a launcher says that it restarts.
        launchers: names of this start's launchers.
    """
    folder = Path(config.run.dir)
    try:
        told = json.loads(read_text(folder / BEGUN))
    except (UserError, ValueError):
        return False
    ours = isinstance(told, dict) and _start(config).items() <= told.items()
    if not ours or not restarted and launchers.isdisjoint(told.get(LAUNCHERS, [])):
        return False
    return config.checkpoint.resume == "none" or bool(files.finished(folder / "checkpoints"))


def _start(config: Config) -> dict[str, str]:
    return {"job": Launch.from_environment().job, "resume": config.checkpoint.resume}
