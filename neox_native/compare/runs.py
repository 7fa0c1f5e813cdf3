"""Two runs or checkpoints: which settings differ, the first logged step that differs, the first checkpoint, and what in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox_native.checkpoint import files
from neox_native.checkpoint.safe import INDEX
from neox_native.compare import logs, states
from neox_native.compare.logs import LogDifference
from neox_native.compare.states import StateDifference
from neox_native.config.load import load
from neox_native.config.schema import Config
from neox_native.config.settings import SETTINGS
from neox_native.config.values import to_toml
from neox_native.errors import UserError
from neox_native.train.fits import config_of
from neox_native.train.provenance import SETTINGS_FILE
from neox_native.units import counted

OF_A_START = ("run.dir", "checkpoint.resume")
"""Settings that are not compared: they say where a run lies and how it began."""
SHOWN = 8
"""Values that differ that people are shown."""


class Side:
    """A run's folder, or a single checkpoint. Raises `UserError` where a path is neither."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.alone = (path / files.MANIFEST).is_file() or (path / INDEX).is_file()
        if self.alone:
            step = files.read_metadata(path).get("step")
            self.checkpoints = {step if type(step) is int else 0: path}
        else:
            found = files.finished(path / "checkpoints") or files.finished(path)
            self.checkpoints = {step: each for each in found if (step := files.step_of(each)) is not None}
        self.log: logs.Log = {} if self.alone else logs.read(path)
        if not self.checkpoints and not self.log:
            raise UserError(
                f"{path} is neither the folder of a run, which has a {logs.METRICS}, nor a checkpoint, which has a {files.MANIFEST}."
            )

    def config(self) -> Config | None:
        """Settings of the run's last start, else those that its last checkpoint tells, if it does. Raises `UserError` where this
        version cannot read them."""
        if not self.alone and (self.path / SETTINGS_FILE).is_file():
            return load(self.path / SETTINGS_FILE)
        told = files.read_metadata(self.checkpoints[max(self.checkpoints)]) if self.checkpoints else {}
        return config_of(told) if "config" in told else None


@dataclass(frozen=True)
class Comparison:
    """What was compared, and what differs."""

    settings: dict[str, tuple[Any, Any]] | str
    """Those that differ, which is no difference between the runs' numbers, or why that cannot be told."""
    lengths: tuple[tuple[int, int], tuple[int, int]]
    """Steps that each run logged, and checkpoints that each has."""
    num_logged: int
    """Logged steps that were compared."""
    logged: list[LogDifference]
    """Values that differ, the first to do so first."""
    saved_steps: tuple[int, ...]
    """Steps whose checkpoints were compared, the last one being the first that differs."""
    saved: StateDifference | None
    """What the last of them differ in."""

    @property
    def equal(self) -> bool:
        """Whether all that was compared is equal bit by bit."""
        return not self.logged and self.saved is None

    def as_json(self) -> dict[str, Any]:
        """One object with the same content."""
        return {
            "equal": self.equal,
            "settings": self.settings,
            "logged_steps": self.num_logged,
            "logged": [difference.as_json() for difference in self.logged],
            "checkpoints": list(self.saved_steps),
            "checkpoint": self.saved and {"step": self.saved_steps[-1], **self.saved.as_json()},
        }

    def lines(self) -> Iterator[str]:
        """The same for people."""
        if isinstance(self.settings, str):
            yield f"settings cannot be compared: {self.settings}"
        elif self.settings:
            yield "settings that differ:"
            yield from (f"  {name}  {to_toml(first)} | {to_toml(second)}" for name, (first, second) in self.settings.items())
        logged, saved = (f"compared, of {one:,} and {other:,}" for one, other in self.lengths)
        differ = f"the first difference is at step {self.logged[0].step}" if self.logged else "bitwise equal"
        yield f"{counted(self.num_logged, 'logged step')} {logged}" + f": {differ}" * (self.num_logged > 0)
        yield from (f"  {difference}" for difference in self.logged[:SHOWN])
        if len(self.logged) > SHOWN:
            yield f"  and {len(self.logged) - SHOWN} more"
        differ = "the last one differs" if self.saved else "bitwise equal"
        yield f"{counted(len(self.saved_steps), 'checkpoint')} {saved}" + f": {differ}" * bool(self.saved_steps)
        if self.saved:
            yield f"  step {self.saved_steps[-1]}: {self.saved}"


def compare(first: Path, second: Path) -> Comparison:
    """Compare two runs or checkpoints: settings, logged steps, and checkpoints of the same step up to the first that differs.

    Raises `UserError` where they have nothing in common, or something is damaged.
    """
    one, other = Side(first), Side(second)
    num_logged, logged = logs.compare(one.log, other.log)
    pairs = _pairs(one, other)
    if not num_logged and not pairs:
        raise UserError(f"{first} and {second} have no step in common: {_told(one)}, {_told(other)}.")
    steps, saved = list[int](), None
    for step, (mine, theirs) in pairs.items():
        steps.append(step)
        if saved := states.compare(mine, theirs):
            break
    lengths = (len(one.log), len(other.log)), (len(one.checkpoints), len(other.checkpoints))
    return Comparison(_settings(one, other), lengths, num_logged, logged, tuple(steps), saved)


def _pairs(one: Side, other: Side) -> dict[int, tuple[Path, Path]]:
    """The checkpoints to compare, by step. Two that were named are compared, whatever their steps."""
    if one.alone and other.alone:
        return {step: (mine, theirs) for (step, mine), theirs in zip(one.checkpoints.items(), other.checkpoints.values())}
    common = sorted(one.checkpoints.keys() & other.checkpoints.keys())
    return {step: (one.checkpoints[step], other.checkpoints[step]) for step in common}


def _settings(one: Side, other: Side) -> dict[str, tuple[Any, Any]] | str:
    """Those that differ, as far as both sides tell theirs, or what keeps this version from reading them."""
    try:
        mine, theirs = one.config(), other.config()
    except UserError as error:
        return str(error)
    if mine is None or theirs is None:
        return {}
    pairs = {name: (setting.of(mine), setting.of(theirs)) for name, setting in SETTINGS.items() if name not in OF_A_START}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _told(side: Side) -> str:
    """The steps of a side, in words."""
    said = [f"logged steps {min(side.log)} to {max(side.log)}"] if side.log else []
    said += [f"checkpoints of steps {', '.join(map(str, sorted(side.checkpoints)))}"] if side.checkpoints else []
    return f"{side.path} has {' and '.join(said)}"
