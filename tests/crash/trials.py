"""A piece of work tried at its crash points: recorded once, then repeated from every state in which a crash or an error of
the disk may leave it."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from neox_native.errors import UserError
from tests.crash import disk
from tests.crash.recorder import Fault, Recorder, recording

FAULTS = ((errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EIO, False))

COUNTS = {"crash": 0, "refuse": 0}
"""How many were tried by the tests that try them all, for the README."""


def count(kind: str, number: int) -> None:
    """Add up what was tried, and show it."""
    COUNTS[kind] += number
    print(f"{number} of this, in all {COUNTS['crash']} crash points and {COUNTS['refuse']} refusals")


@dataclass
class Work:
    """What is tried.

    Args:
        root: the folder under which it writes; what lies there when the trials begin is there at each start.
        do: the work; it calls `mark` of the recorder that it is given for what it has promised.
        again: the same command after a crash, given what had been promised; it asserts what must hold.
    """

    root: Path
    do: Callable[[Recorder], None]
    again: Callable[[list[disk.Op]], None]
    before: disk.Tree = field(init=False)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.before = disk.Disk.read(self.root).tree()

    def record(self, fault: Fault | None = None) -> Recorder:
        """Do it once from the start."""
        self._lay(self.before)
        with recording(self.root, fault) as recorder:
            self.do(recorder)
        return recorder

    def crash(self, sample: int | None, part: slice = slice(None)) -> int:
        """Try `sample` of the crash points, or all, of a part of them; returns how many it has."""
        recorder = self.record()
        assert disk.Disk.read(self.root).tree() == recorder.disk.tree(), "something was written without a record"
        states = list(disk.Crashes(recorder.before, recorder.ops).states())[part]
        for state in states if sample is None else random.Random(0).sample(states, min(sample, len(states))):
            promised = [op for op in recorder.ops[: state.at] if op.kind == "mark"]
            last = recorder.ops[state.at - 1] if state.at else None
            self._lay(state.tree)
            self._again(promised, f"{state.at} operations ({last and last._replace(c=None)}), {state.how}")
        return len(states)

    def refuse(self, sample: int | None, part: slice = slice(None)) -> int:
        """Let the disk refuse `sample` of the operations, or all, in each way, of a part; returns how many it has."""
        recorder = self.record()
        faults = [Fault(at, *how) for at in range(1, recorder.tried + 1) for how in FAULTS][part]
        for fault in faults if sample is None else random.Random(0).sample(faults, min(sample, len(faults))):
            recorder = Recorder(self.root)
            try:
                with recording(self._fresh(), fault) as recorder:
                    self.do(recorder)
            except UserError as error:
                sentence = str(error)
                if "\n" in sentence or os.strerror(fault.errno) not in sentence or str(self.root) not in sentence:
                    self.wrong.append(f"{fault}: {sentence}")
            except BaseException as error:
                self.wrong.append(f"{fault}: {recorder.failed[:1]} was refused, no sentence but {type(error).__name__}: {error}")
            left = disk.Disk.read(self.root).tree()
            self._lay(left)  # other inodes: a lock that the failed one still holds in this process does not count
            self._again([op for op in recorder.ops if op.kind == "mark"], f"{fault}: {recorder.failed[:1]} was refused")
        return len(faults)

    def _fresh(self) -> Path:
        self._lay(self.before)
        return self.root

    def _lay(self, tree: disk.Tree) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        disk.write(tree, self.root)

    def _again(self, promised: list[disk.Op], what: str) -> None:
        try:
            self.again(promised)
        except Exception as error:
            self.wrong.append(f"after {what}: {type(error).__name__}: {str(error)[:400]}")


def without(tree: disk.Tree, *names: str) -> disk.Tree:
    """What differs from run to run left out: files of these names."""
    return {path: content for path, content in tree.items() if os.path.basename(path) not in names}


def differences(found: disk.Tree, expected: disk.Tree) -> Iterator[str]:
    """What is missing, too much or different, in words."""
    for path in sorted(found.keys() | expected.keys()):
        if path not in found:
            yield f"{path} is missing"
        elif path not in expected:
            yield f"{path} was left"
        elif found[path] != expected[path]:
            yield f"{path} differs"
