"""Every operation on the files below a folder, recorded as it happens, and made to fail where a test says so.

Python's own ways to the disk are replaced while a workload runs: `open`, `io.FileIO` and the calls of `os`. What C code
writes through a descriptor (NumPy's `tofile`) is found by comparing the file's size with the record before the next
operation on it. That nothing has escaped is shown by the record, which played back must give the folder as it is.
"""

from __future__ import annotations

import builtins
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.crash.disk import Disk, Op

GROWS = ("create", "write", "mkdir", "sync")
"""What a full disk refuses; it still renames and deletes."""
OPEN, FILE_IO = io.open, io.FileIO
OF_OS = ("open", "close", "write", "pwrite", "ftruncate", "fsync", "fdatasync", "rename", "replace", "link", "unlink", "remove",
         "mkdir", "rmdir")  # fmt: skip


class Fault(NamedTuple):
    """What the operating system refuses: the operation of that number, and with `forever` all that grow after it."""

    at: int
    errno: int
    forever: bool = False


class Recorder:
    """The operations below `root` in order; see `recording`."""

    def __init__(self, root: Path, fault: Fault | None = None) -> None:
        self.root, self.fault = root.resolve(), fault
        self.disk = Disk.read(self.root)
        self.before = self.disk.copy()
        self.ops: list[Op] = []
        self.tried = 0
        self.failed: list[str] = []
        """What was refused."""
        self.open: dict[int, int] = {}
        """Descriptor -> inode."""
        self._lock = threading.RLock()

    def name(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path relative to the root, or None where it lies elsewhere."""
        if isinstance(path, int):
            return None
        folder, name = os.path.split(os.path.abspath(os.path.join(_path_of(dir_fd), os.fsdecode(path))))
        inside = os.path.relpath(os.path.join(os.path.realpath(folder), name), self.root)
        return None if inside == "." or inside.startswith("..") else inside

    def may(self, kind: str, path: str | int, named: bool = True) -> None:
        """Count an operation, and fail it where the fault says so; the system names a path only where it was given one."""
        with self._lock:
            self.tried += 1
            fault = self.fault
            if fault and (self.tried == fault.at or (fault.forever and self.tried > fault.at and kind in GROWS)):
                path = self.disk.name_of(path) if isinstance(path, int) else path
                self.failed.append(f"{kind} {path}")
                raise OSError(fault.errno, os.strerror(fault.errno), *([str(self.root / path)] if named else []))

    def done(self, kind: str, *what: Any) -> None:
        """Note an operation that has happened."""
        with self._lock:
            self.ops.append(Op(kind, *what))
            self.disk.apply(self.ops[-1])

    def mark(self, what: str, value: Any = None) -> None:
        """Note what the program has promised by now."""
        self.done("mark", what, value)

    def notice(self, fd: int) -> None:
        """Note what others than Python have written to an open file, always at its end."""
        inode = self.open[fd]
        known = len(self.disk.files.get(inode, b""))
        if inode in self.disk.files and os.fstat(fd).st_size > known:
            with OPEN(f"/proc/self/fd/{fd}", "rb") as file:
                file.seek(known)
                self.done("write", inode, known, file.read())

    def changes(self, change: Callable[[], Any], kind: str, inode: int, *what: Any) -> Any:
        """Change an open file and note it; of a write that the disk refuses, half was done."""
        try:
            self.may(kind, inode, named=False)
        except OSError:
            if kind == "write" and len(what[1]) > 1:
                self.half_written(inode, *what)
            raise
        result = change()
        self.done(kind, inode, *what)
        return result

    def half_written(self, inode: int, offset: int, data: bytes) -> None:
        """What a full disk has taken before it refused the rest."""
        half = data[: len(data) // 2]
        with OPEN(self.root / self.disk.name_of(inode), "r+b", 0) as file:
            file.seek(offset)
            file.write(half)
        self.done("write", inode, offset, half)


def _path_of(descriptor: int | None) -> str:
    return "" if descriptor is None else os.readlink(f"/proc/self/fd/{descriptor}")


@contextmanager
def recording(root: Path, fault: Fault | None = None) -> Iterator[Recorder]:
    """Record what the body does below `root`, which exists. Nothing is really synced meanwhile."""
    recorder = Recorder(root, fault)
    calls = Calls(recorder)
    file_io = type("FileIO", (RecordedFile,), {"recorder": recorder})
    replaced: list[tuple[Any, str, Any]] = []
    new = [(builtins, "open", _opener(recorder, file_io)), (io, "open", _opener(recorder, file_io)), (io, "FileIO", file_io)]
    try:
        for where, name, by in new + [(os, name, getattr(calls, name)) for name in OF_OS]:
            replaced.append((where, name, getattr(where, name)))
            setattr(where, name, by)
        yield recorder
    finally:
        for where, name, original in reversed(replaced):
            setattr(where, name, original)


class RecordedFile(io.FileIO):
    """A file that is recorded where it lies below the root and is written to."""

    recorder: Recorder
    inode: int | None = None

    def __init__(self, file: Any, mode: str = "r", closefd: bool = True, opener: Any = None) -> None:
        recorder, writes = self.recorder, any(letter in mode for letter in "wax+")
        name = recorder.name(file) if writes and opener is None else None
        new = name is not None and not os.path.lexists(file)
        if name is not None and (new or "w" in mode):
            recorder.may("create", name)
        super().__init__(file, mode, closefd, opener)
        if isinstance(file, int):
            self.inode = recorder.open.get(file)
        elif name is not None:
            if new:
                recorder.done("create", name, recorder.disk.new_inode())
            self.inode = recorder.disk.inode(name)
            if "w" in mode and recorder.disk.files[self.inode]:
                recorder.done("truncate", self.inode, 0)
            recorder.open[self.fileno()] = self.inode

    def write(self, data: Any) -> int:
        if self.inode is None:
            return super().write(data)
        data = bytes(memoryview(data))
        self.recorder.notice(self.fileno())
        offset = os.fstat(self.fileno()).st_size if "a" in self.mode else self.tell()
        return self.recorder.changes(lambda: FILE_IO.write(self, data), "write", self.inode, offset, data)

    def truncate(self, size: int | None = None) -> int:
        if self.inode is None:
            return super().truncate(size)
        self.recorder.notice(self.fileno())
        size = self.tell() if size is None else size
        return self.recorder.changes(lambda: FILE_IO.truncate(self, size), "truncate", self.inode, size)

    def close(self) -> None:
        if not self.closed and self.inode is not None and self.fileno() in self.recorder.open:
            self.recorder.notice(self.fileno())
            self.recorder.open.pop(self.fileno())
        super().close()


def _opener(recorder: Recorder, file_io: type[RecordedFile]) -> Callable[..., Any]:
    def recorded_open(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
        newline: Any = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        """`io.open`, made of Python's own layers over a recorded file."""
        known = recorder.name(file) is not None or (isinstance(file, int) and file in recorder.open)
        if not known or not any(letter in mode for letter in "wax+") or opener is not None:
            return OPEN(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = file_io(file, mode.replace("b", "").replace("t", ""), closefd)
        if buffering == 0:
            return raw
        size = io.DEFAULT_BUFFER_SIZE if buffering in (-1, 1) else buffering
        buffered = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)

    return recorded_open


class Calls:
    """The calls of `os` that change a disk."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.real = {name: getattr(os, name) for name in OF_OS}
        self.rename = self._on_two_paths("rename", "rename")
        self.replace = self._on_two_paths("rename", "replace")
        self.link = self._on_two_paths("link", "link")
        self.unlink, self.remove = self._on_path("unlink", "unlink"), self._on_path("unlink", "remove")
        self.mkdir, self.rmdir = self._on_path("mkdir", "mkdir"), self._on_path("rmdir", "rmdir")
        self.fdatasync = self.fsync

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        recorder, name = self.recorder, self.recorder.name(path, dir_fd)
        new = name is not None and bool(flags & os.O_CREAT) and recorder.disk.find(name) is None
        if name is not None and (new or flags & os.O_TRUNC):
            recorder.may("create", name)
        descriptor = self.real["open"](path, flags, mode, dir_fd=dir_fd)
        if new:
            recorder.done("create", name, recorder.disk.new_inode())
        inode = recorder.disk.find(name) if name is not None else None
        if inode is None and _path_of(descriptor) == str(recorder.root):
            inode = recorder.disk.root
        is_read = inode in recorder.disk.files and not flags & (os.O_WRONLY | os.O_RDWR)
        if inode is not None and not is_read:
            recorder.open[descriptor] = inode
            if flags & os.O_TRUNC and recorder.disk.files[inode]:
                recorder.done("truncate", inode, 0)
        return descriptor

    def close(self, descriptor: int) -> None:
        if descriptor in self.recorder.open:
            self.recorder.notice(descriptor)
            self.recorder.open.pop(descriptor)
        self.real["close"](descriptor)

    def write(self, descriptor: int, data: Any) -> int:
        offset = os.lseek(descriptor, 0, os.SEEK_CUR) if descriptor in self.recorder.open else 0
        return self._write("write", descriptor, data, offset)

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        return self._write("pwrite", descriptor, data, offset, offset)

    def _write(self, call: str, descriptor: int, data: Any, offset: int, *more: int) -> int:
        if (inode := self.recorder.open.get(descriptor)) is None:
            return self.real[call](descriptor, data, *more)
        self.recorder.notice(descriptor)
        data = bytes(data)
        return self.recorder.changes(lambda: self.real[call](descriptor, data, *more), "write", inode, offset, data)

    def ftruncate(self, descriptor: int, size: int) -> None:
        if (inode := self.recorder.open.get(descriptor)) is None:
            return self.real["ftruncate"](descriptor, size)
        self.recorder.notice(descriptor)
        return self.recorder.changes(lambda: self.real["ftruncate"](descriptor, size), "truncate", inode, size)

    def fsync(self, file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if (inode := self.recorder.open.get(descriptor)) is not None:
            self.recorder.notice(descriptor)
            self.recorder.changes(lambda: None, "sync", inode)

    def _on_two_paths(self, kind: str, call: str) -> Callable[..., None]:
        def change(old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
            names = self.recorder.name(old, src_dir_fd), self.recorder.name(new, dst_dir_fd)
            assert (names[0] is None) == (names[1] is None), "a move out of the folder is not modelled"
            if names[0] is not None:
                self.recorder.may(kind, names[0])
            self.real[call](old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            if names[0] is not None:
                self.recorder.done(kind, *names)

        return change

    def _on_path(self, kind: str, call: str) -> Callable[..., None]:
        def change(path: Any, *arguments: Any, dir_fd: int | None = None) -> None:
            recorder, name = self.recorder, self.recorder.name(path, dir_fd)
            there = name is not None and recorder.disk.find(name) is not None
            if name is not None and there != (kind == "mkdir"):  # else it is refused without any fault
                recorder.may(kind, name)
            self.real[call](path, *arguments, dir_fd=dir_fd)
            if name is not None:
                recorder.done(kind, name, *([recorder.disk.new_inode()] if kind == "mkdir" else []))

        return change
