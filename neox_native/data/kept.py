"""Long orders on disk: drawn once, mapped into memory by every rank and every later run.

A folder for each order, named by the hash of what the order follows from, so that none is ever stale. It has one
`.npy` file for each array and a list of their names, and it appears complete or not at all. One that was damaged since
is drawn and written anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

from neox_native.data.order import Arrays, Draw, Facts
from neox_native.durable import clear_away, put_in_place, replacing, temporary_name, write_whole, writing
from neox_native.errors import UserError

NAMES = "names.json"


def kept(folder: Path, facts: Facts, draw: Draw) -> Arrays:
    """The arrays that follow from `facts`: mapped from `folder`, or drawn and left there.

    Ranks of a machine that ask at the same time wait for the first, which draws. Where the folder cannot be written,
    each draws in its own memory.
    """
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    place = folder / f"neox-{name}"
    if found := _read(place):
        clear_away(place)
        return found
    drawn: Arrays = {}
    try:
        with writing(place, wait=True):
            if found := _read(place):
                return found
            drawn = draw()
            _write(place, drawn)
    except (OSError, UserError):
        return drawn or draw()
    return _read(place) or drawn


def _read(place: Path) -> Arrays:
    """The arrays of a folder; none where it is missing or damaged."""
    try:
        names = json.loads((place / NAMES).read_text())
        # As plain arrays: indexing a memmap object is slow.
        return {name: np.asarray(np.load(place / f"{name}.npy", mmap_mode="r")) for name in names}
    except (OSError, ValueError, EOFError):
        return {}


def _write(place: Path, arrays: Arrays) -> None:
    """Puts the folder there, the lock being held."""
    temporary = temporary_name(place)
    temporary.mkdir()
    try:
        for name, array in arrays.items():
            with replacing(temporary / f"{name}.npy") as file:
                np.save(file, array)
        write_whole(temporary / NAMES, json.dumps(list(arrays)).encode())
        put_in_place(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
