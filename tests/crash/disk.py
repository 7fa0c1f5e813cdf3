"""A disk as a crash may leave it: which operations have reached it is the disk's choice until they are synced.

The model is the weak one of ALICE (Pillai et al. 2014, "All file systems are not created equal", section 3): writes to a
file are durable after a sync of the file; the entries of a folder (made, renamed, deleted) after a sync of the folder. Until
then each may be lost alone or kept alone, and a write may be torn. A rename is atomic.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Tree = dict[str, bytes | None]
"""Path -> content, None for a folder; sorted."""


class Op(NamedTuple):
    """One operation. Paths are relative to the folder.

    create PATH INODE, mkdir PATH INODE, rename OLD NEW, link OLD NEW, unlink PATH, rmdir PATH, write INODE OFFSET DATA,
    truncate INODE SIZE, sync INODE, mark WHAT VALUE.
    """

    kind: str
    a: Any
    b: Any = None
    c: Any = None

    @property
    def on_data(self) -> bool:
        """Whether it changes a file's content, not a folder's entries."""
        return self.kind in ("write", "truncate")


class Disk:
    """Files and folders as numbered inodes."""

    def __init__(self) -> None:
        self.root = 0
        self.folders: dict[int, dict[str, int]] = {0: {}}
        self.files: dict[int, bytes] = {}
        self.next = 1

    @classmethod
    def read(cls, root: Path) -> Disk:
        """What lies in a folder of the real disk."""
        disk = cls()
        for folder, folders, files in os.walk(root):
            inside = os.path.relpath(folder, root)
            for name in sorted(folders):
                disk.apply(Op("mkdir", os.path.normpath(os.path.join(inside, name)), disk.new_inode()))
            for name in sorted(files):
                inode = disk.new_inode()
                disk.apply(Op("create", os.path.normpath(os.path.join(inside, name)), inode))
                disk.files[inode] = Path(folder, name).read_bytes()
        return disk

    def copy(self) -> Disk:
        """One that may change apart from this."""
        other = Disk()
        other.folders = {inode: dict(entries) for inode, entries in self.folders.items()}
        other.files, other.next = dict(self.files), self.next
        return other

    def new_inode(self) -> int:
        """A number that is free."""
        self.next += 1
        return self.next - 1

    def find(self, path: str) -> int | None:
        """Inode of a path, None where there is none."""
        inode: int | None = self.root
        for part in path.split(os.sep):
            inode = self.folders.get(inode, {}).get(part) if inode is not None else None
        return inode

    def inode(self, path: str) -> int:
        """Inode of a path that is there."""
        found = self.find(path)
        assert found is not None, f"{path} was made without a record"
        return found

    def name_of(self, inode: int) -> str:
        """A path of an inode, for messages."""
        return next((path for path, found in self._walk(self.root, "") if found == inode), "a deleted file")

    def place(self, path: str) -> tuple[int, str]:
        """Inode of the folder that holds a path, and the name in it."""
        folder, name = os.path.split(path)
        return (self.inode(folder) if folder else self.root), name

    def apply(self, op: Op) -> None:
        """Do what was done."""
        self.apply_placed(self.placed(op))

    def placed(self, op: Op) -> Op:
        """The operation with inodes and names in place of paths, which no later rename changes."""
        if op.kind in ("create", "mkdir"):
            return Op("entry", self.place(op.a), op.b, op.kind == "mkdir")
        if op.kind in ("unlink", "rmdir"):
            return Op("gone", self.place(op.a))
        if op.kind == "rename":
            return Op("moved", self.place(op.a), self.place(op.b), self.inode(op.a))
        if op.kind == "link":
            return Op("entry", self.place(op.b), self.inode(op.a), False)
        return op

    def apply_placed(self, op: Op) -> None:
        """Do what was done, wherever its neighbours were lost."""
        if op.kind == "entry":
            (folder, name), inode, is_folder = op.a, op.b, op.c
            self.folders[folder][name] = inode
            (self.folders.setdefault(inode, {}) if is_folder else self.files.setdefault(inode, b""))
        elif op.kind == "gone":
            self.folders[op.a[0]].pop(op.a[1], None)
        elif op.kind == "moved":
            (folder, name), (new_folder, new_name), inode = op.a, op.b, op.c
            self.folders[folder].pop(name, None)
            self.folders[new_folder][new_name] = inode
        elif op.kind == "write":
            content = self.files.get(op.a, b"").ljust(op.b, b"\0")
            self.files[op.a] = content[: op.b] + op.c + content[op.b + len(op.c) :]
        elif op.kind == "truncate":
            self.files[op.a] = self.files.get(op.a, b"")[: op.b].ljust(op.b, b"\0")

    def _walk(self, inode: int, path: str) -> Iterator[tuple[str, int]]:
        for name, found in sorted(self.folders[inode].items()):
            inside = os.path.join(path, name)
            yield inside, found
            if found in self.folders:
                yield from self._walk(found, inside)

    def tree(self) -> Tree:
        """What a program would see."""
        return {path: self.files.get(inode) for path, inode in self._walk(self.root, "")}


class State(NamedTuple):
    """A disk after a crash."""

    tree: Tree
    at: int
    """Operations that were done."""
    how: str
    """What the disk made of those that were not synced."""


class Crashes:
    """The states in which a crash may leave a disk during recorded operations.

    Args:
        before: the disk before, all of it durable.
        ops: what was done.
    """

    def __init__(self, before: Disk, ops: Sequence[Op]) -> None:
        self.before = before
        self.ops: list[Op] = []
        self.after = [before.copy()]
        """The disk after each number of operations, none of them lost."""
        for op in ops:
            self.after.append(self.after[-1].copy())
            self.ops.append(self.after[-1].placed(op))
            self.after[-1].apply_placed(self.ops[-1])
        self.units = [_unit(op) for op in ops]
        self._name_writes(ops)
        self.syncs = [number for number, op in enumerate(ops) if op.kind == "sync"]
        self.made_durable = [self._durable_from(number) for number in range(len(ops))]

    def _name_writes(self, ops: Sequence[Op]) -> None:
        """Writes and syncs know inodes only: give them the unit in which their inode was made or stood before."""
        of_inode = {inode: _unit_of(path) for path, inode in self.before._walk(self.before.root, "")}
        for number, op in enumerate(ops):
            if op.kind in ("create", "mkdir"):
                of_inode[op.b] = self.units[number]
            elif op.kind in ("write", "truncate", "sync"):
                self.units[number] = of_inode.get(op.a, "")

    def _durable_from(self, number: int) -> int:
        """After how many operations this one can no longer be lost."""
        op = self.ops[number]
        if op.kind in ("sync", "mark"):
            return 0
        needed = {op.a} if op.on_data else {op.a[0]}
        if op.kind == "moved":
            needed.add(op.b[0])
        for later in self.syncs:
            if later > number:
                needed.discard(self.ops[later].a)
            if not needed:
                return later + 1
        return len(self.ops) + 1

    def states(self) -> Iterator[State]:
        """Each distinct one once, with the last point at which it can arise, at which most has been promised."""
        found: dict[tuple[tuple[str, bytes | None], ...], State] = {}
        for at in range(len(self.ops) + 1):
            for how, lost, torn in self._choices(at):
                tree = self._build(at, lost, torn)
                found[tuple(tree.items())] = State(tree, at, how)
        yield from found.values()

    def _choices(self, at: int) -> Iterator[tuple[str, set[int], dict[int, str]]]:
        """What may have become of the first `at` operations: a description, those lost, and writes that are torn."""
        unsynced = [number for number in range(at) if self.made_durable[number] > at]
        data = {number for number in unsynced if self.ops[number].on_data}
        entries = set(unsynced) - data
        yield "all is there", set(), {}
        if not unsynced:
            return
        yield "nothing unsynced is there", set(unsynced), {}
        yield "entries without data", data, {}
        yield "data without entries", entries, {}
        # Of the writes to one file the ends stand for all; operations on unrelated things say nothing together, but for
        # those that promise something.
        last, commits = self.units[at - 1], self.ops[at - 1].kind in ("moved", "gone", "mark")
        for number in () if self._amid_writes(at) else sorted(entries | self._ends(data)):
            if commits or self.units[number] == last:
                yield f"operation {number} is lost", {number}, {}
                yield f"of the unsynced, operation {number} alone is there", set(unsynced) - {number}, {}
        for number in sorted(data)[-1:] if self._amid_writes(at) else sorted(self._ends(data))[-3:]:
            if self.ops[number].kind == "write":
                yield f"operation {number} is torn", set(), {number: "half"}
                yield f"operation {number} left zeros", set(), {number: "zeros"}

    def _amid_writes(self, at: int) -> bool:
        """Whether the operations before and after the crash write to one file."""
        around = self.ops[at - 1 : at + 1]
        return len(around) == 2 and all(op.kind == "write" for op in around) and around[0].a == around[1].a

    def _ends(self, data: set[int]) -> set[int]:
        """The first and the last of the operations on each file."""
        of_file: dict[int, list[int]] = {}
        for number in sorted(data):
            of_file.setdefault(self.ops[number].a, []).append(number)
        return {number for numbers in of_file.values() for number in (numbers[0], numbers[-1])}

    def _build(self, at: int, lost: set[int], torn: dict[int, str]) -> Tree:
        first = min(lost | torn.keys(), default=at)
        disk = self.after[first].copy()
        for number, op in enumerate(self.ops[first:at], first):
            if number in lost:
                if op.kind == "entry":  # what is written to it later has a place, though none will find it
                    (disk.folders.setdefault(op.b, {}) if op.c else disk.files.setdefault(op.b, b""))
                continue
            if number in torn:
                data = op.c[: len(op.c) // 2] if torn[number] == "half" else bytes(len(op.c))
                op = op._replace(c=data)
            disk.apply_placed(op)
        return disk.tree()


def _unit(op: Op) -> str:
    return _unit_of(op.a) if isinstance(op.a, str) and op.kind != "mark" else ""


def _unit_of(path: str) -> str:
    """What stands or falls together: a checkpoint, an export, a log."""
    parts = path.split(".tmp")[0].split(os.sep)
    return os.sep.join(parts[:2])


def write(tree: Tree, root: Path) -> None:
    """Make a folder of the real disk that tree; `root` does not exist."""
    root.mkdir()
    for path, content in tree.items():
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)
