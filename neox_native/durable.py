"""Files that are whole or absent whenever the power goes, and locks: what everything that is written rests on.

A file is written as `NAME.tmp-TOKEN`, flushed to the disk, renamed, and its folder flushed. What a killed process left
under such a name is swept by the next one that holds the lock of that name.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from neox_native.errors import UserError

TEMPORARY = ".tmp-"
REPLACED = TEMPORARY + "replaced"
"""Ends the name of a folder that makes way, until its replacement is there; see `put_back`."""


@contextmanager
def disk_errors_named(what: str | Path) -> Iterator[None]:
    """Turns whatever the system refuses (a full disk, a quota, a missing permission) into a `UserError` that names
    `what`."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "free space there or choose another place" if full else "choose another place"
        raise UserError(f"{what} could not be written: {error.strerror or error}; {way_out}.") from error


def temporary_name(path: Path) -> Path:
    """A new name beside `path`, which `sweep` knows."""
    return path.with_name(f"{path.name}{TEMPORARY}{secrets.token_hex(4)}")


def new_file(path: Path) -> BinaryIO:
    """A file to write under a temporary name, for `sync_and_rename` or `discard`. It is created, so that no symbolic link
    leads elsewhere."""
    return open(temporary_name(path), "xb")


def sync_file(file: IO[Any]) -> None:
    """Flushes what was written to a file to the disk: what waits in its buffer, then what the kernel has."""
    file.flush()
    os.fsync(file.fileno())


def sync_and_rename(file: BinaryIO, final: Path) -> None:
    """Makes a `new_file` durable and gives it its final name in one atomic step; closes it."""
    sync_file(file)
    file.close()
    os.replace(file.name, final)
    sync_folder(final.parent)


def discard(file: BinaryIO) -> None:
    """Closes a `new_file` and removes it, unless it has its final name."""
    with suppress(OSError):  # closing writes again what a full disk has refused
        file.close()
    with suppress(OSError):
        os.unlink(file.name)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well; else whatever stood there stays.

    Raises `UserError` that names `path` where the disk refuses.
    """
    with disk_errors_named(path):
        file = new_file(path)
        try:
            yield file
            sync_and_rename(file, path)
        finally:
            discard(file)


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file; it is whole, the old one or the new one, whenever the power goes. Raises as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


def sync_folder(path: Path) -> None:
    """Flushes a folder's entries to the disk, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it that are missing, each flushed to the disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error
    sync_folder(path.parent)


def move(path: Path, to: Path) -> None:
    """Gives a file or folder another name, perhaps in a folder that is missing."""
    make_folder(to.parent)
    path.rename(to)
    sync_folder(to.parent)
    if path.parent != to.parent:
        sync_folder(path.parent)


def remove_file(path: Path) -> None:
    """Removes a file that may be there."""
    if path.exists():
        path.unlink()
        sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder so that it is there as a whole or not at all; `sweep` ends what a kill cut short."""
    removed = temporary_name(path)
    move(path, removed)  # else the disk may lose the files and keep the name
    shutil.rmtree(removed, ignore_errors=True)


def put_in_place(finished: Path, path: Path) -> None:
    """Gives a folder whose files are on the disk its final name; one that stands there makes way first.

    A crash leaves the old one or the new one, the old one perhaps under the name from which `put_back` takes it.
    """
    sync_folder(finished)
    replaced = path.with_name(path.name + REPLACED)
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        move(path, replaced)
    move(finished, path)
    shutil.rmtree(replaced, ignore_errors=True)


def put_back(folder: Path, names: str) -> None:
    """Gives what made way its name again, where its replacement never came; `names` is a pattern."""
    for replaced in sorted(folder.glob(names + REPLACED)):
        path = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if not path.exists():
            move(replaced, path)


def sweep(folder: Path, names: str) -> None:
    """Removes what killed writers left of the paths in a folder that match a pattern; their locks must be held."""
    for leftover in folder.glob(names + TEMPORARY + "*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


class Lock:
    """A file that one process at a time, with the processes it forks, holds. The system gives it back when they end,
    however they end.

    Args:
        create: how the file is opened: made where it is missing, with 0 never, with `os.O_CREAT | os.O_EXCL` always.

    Raises `BlockingIOError` where another holds it and `wait` is not asked for. Where the disk knows no locks, nobody is
    kept out and `refusal` says why.
    """

    def __init__(self, path: Path, wait: bool = False, create: int = os.O_CREAT) -> None:
        self.path = path
        self.refusal = ""
        while True:
            self._descriptor = os.open(path, os.O_RDWR | create | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(self._descriptor)
                raise
            except OSError as error:
                self.refusal = error.strerror or str(error)
            if self.refusal or self._is_named():
                return
            os.close(self._descriptor)

    def _is_named(self) -> bool:
        """Whether the name still leads to the file that is held: its last holder may have removed it meanwhile."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def write(self, text: str) -> None:
        """Puts a word about the holder into the file."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def close(self) -> None:
        """Lets go of the lock; its file stays."""
        os.close(self._descriptor)


@contextmanager
def writing(path: Path, *leaves: Path, wait: bool = False) -> Iterator[None]:
    """Holds PATH.lock for a block that writes `path`; what killed writers of `path`, or of `leaves`, left is removed first.
    The lock's file goes with the block; one that a kill left, which is empty, goes with the next, or by `clear_away`.

    Raises `UserError` where the folder cannot be written, and where another process holds the lock and `wait` is not
    asked for.
    """
    name = path.with_name(path.name + ".lock")
    with disk_errors_named(path):
        make_folder(path.parent)
        try:
            lock = Lock(name, wait)
        except BlockingIOError as error:
            raise UserError(f"{path} is being written by another process, which holds {name}; let it finish.") from error
    try:
        with disk_errors_named(path):
            for each in () if lock.refusal else leaves or (path,):
                sweep(each.parent, glob.escape(each.name))
        yield
    finally:
        if not lock.refusal:
            with suppress(OSError):  # the next holder removes it
                os.unlink(name)
        lock.close()


def clear_away(path: Path) -> None:
    """Removes what a killed writer left beside a `path` that is finished, its lock's file too. Lets be whoever is at work, and
    a folder that may not be written."""
    if path.with_name(path.name + ".lock").exists():
        with suppress(UserError), writing(path):
            pass
