"""Files that somebody else may have put there: plain files alone are opened, read up to a limit, and refused in a sentence.

A pipe would wait for ever, a symbolic link would lead what is written elsewhere, and a deep or endless JSON file would
take the process with it.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn, TextIO

from neox_native.errors import UserError

MAX_TEXT_BYTES = 1 << 25
"""Largest file that is read as text: a manifest of 300,000 files."""


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES, missing: str = "") -> bytes:
    """All of a plain file, which may be a link to one.

    Args:
        limit: largest file that is read [bytes].
        missing: ends the sentence about a file that is not there.

    Raises:
        UserError: it is missing, cannot be read, is no plain file, or larger.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path} is refused: it is no plain file.")
            if status.st_size > limit:
                raise UserError(f"{path} is refused: it has {status.st_size:,} bytes, more than {limit:,}.")
            return file.read(status.st_size)
    except FileNotFoundError:
        raise UserError(f"{path} is missing" + (f": {missing}." if missing else ".")) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def read_text(path: Path, missing: str = "") -> str:
    """All of a UTF-8 text. Raises `UserError` as `read_bytes` does, and for other bytes."""
    try:
        return read_bytes(path, missing=missing).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is refused: it is not UTF-8 text ({error.reason} at byte {error.start}).") from None


def read_json(path: Path, missing: str = "") -> dict[str, Any]:
    """The JSON object that a file holds, in the strict sense: no NaN, no number that overflows, no nesting without end.

    Raises `UserError` as `read_text` does, and where it holds anything else. What stands in the object may be of any type.
    """
    try:
        value = json.loads(read_text(path, missing), parse_float=_finite, parse_constant=_not_json)
    except RecursionError:
        raise UserError(f"{path} is refused: it is not a JSON object that anybody wrote: it nests too deeply.") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is refused: it is not a JSON object: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is refused: it is not a JSON object.")
    return value


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _not_json(text)


def _not_json(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is no number")


def at_home(name: str) -> Path:
    """The path of that name, its "~" replaced by the home folder. Raises `UserError` where no such user has one."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name!r} cannot be found: {str(error).rstrip('.').lower()}; write the whole path.") from None


def is_plain_name(name: Any) -> bool:
    """Whether it names a file right inside a folder: no path, nothing that a terminal would act on."""
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and "/" not in name


def append_to(path: Path) -> TextIO:
    """A plain file opened for lines to follow those it has, each on its way when it ends. Raises `OSError`."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "a", buffering=1, encoding="utf-8")
