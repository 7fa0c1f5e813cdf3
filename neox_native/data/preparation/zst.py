"""Unpacks .zst files: with the package `zstandard` where it is installed, else with the program `zstd`."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

try:
    import zstandard
except ImportError:  # optional
    zstandard = None

PACKED_BYTES = 1024
"""Packed bytes that are unpacked at once. A block of a few bytes may hold 128 KiB, so this bounds memory at 32 MiB."""


def can_unpack() -> bool:
    """Whether this machine can."""
    return zstandard is not None or shutil.which("zstd") is not None


class _Frames(io.RawIOBase):
    """The content of a file's frames, one after the other. Raises `EOFError` where it is damaged or cut off: the package's
    own reader takes a frame without an end for a whole one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._packed = self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._unpacked and self._unpack():
            pass
        count = min(len(buffer), len(self._unpacked))
        buffer[:count], self._unpacked = self._unpacked[:count], self._unpacked[count:]
        return count

    def _unpack(self) -> bool:
        """Takes the next bytes; False at the end of the file."""
        packed = self._packed or self._file.read(PACKED_BYTES)
        self._packed = b""
        if not packed:
            if self._begun:
                raise EOFError("it ends within a frame")
            return False
        try:
            self._unpacked = self._frame.decompress(packed)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        self._begun = not self._frame.eof
        if self._frame.eof:
            self._packed = self._frame.unused_data
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        return True


@contextmanager
def unpacked_zst(path: str) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked. Raises `EOFError` where it is damaged."""
    if zstandard is not None:
        with open(path, "rb") as file:
            yield io.BufferedReader(_Frames(file), 1 << 16)
        return
    with subprocess.Popen(["zstd", "-dcq", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        yield process.stdout  # type: ignore[misc]
        if process.wait():
            raise EOFError(process.stderr.read().decode(errors="replace").strip())
