"""Long orders on disk: drawn once, mapped into memory by every rank and every later run.

A folder for each order, named by the hash of what the order follows from, so that none is ever stale, with one `.npy`
file for each of its arrays. It appears complete or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from neox_native.data.indexed import sync_and_rename
from neox_native.data.order import Arrays, Draw, Facts


def kept(folder: Path, facts: Facts, draw: Draw) -> Arrays:
    """The arrays that follow from `facts`: mapped from `folder`, or drawn and left there.

    Ranks of a machine that ask at the same time wait for the first, which draws. Where the folder cannot be written,
    each draws in its own memory.
    """
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    place = folder / f"neox-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"neox-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when this process ends, however it ends
            if not place.exists():
                _write(place, draw())
        # As plain arrays: indexing a memmap object is slow.
        return {path.stem: np.asarray(np.load(path, mmap_mode="r")) for path in place.glob("*.npy")}
    except OSError:
        return draw()


def _write(place: Path, arrays: Arrays) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f"{place.name}.tmp", dir=place.parent))
    try:
        for name, array in arrays.items():
            with (temporary / f"{name}.part").open("wb") as file:
                np.save(file, array)
                sync_and_rename(file, temporary / f"{name}.part", temporary / f"{name}.npy")
        os.rename(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
