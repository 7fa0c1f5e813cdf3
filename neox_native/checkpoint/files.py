"""What a checkpoint is on disk, and how to tell a whole one from a damaged one. No ranks, no tensors.

    checkpoints/step_000000100/
        __0_0.distcp, __1_0.distcp, ...   shards, one file per rank that had something to write (DCP's format)
        .metadata                         DCP's index: which box of which tensor lies where in which file
        metadata.json                     what the run says about itself: step, consumed samples, model, data, layout
        tokenizer.json                    the tokenizer, where it came from such a file
        hashes.json                       a hash of every tensor and one of all, equal in every layout if the state is equal
        manifest.json                     size and crc32 of every other file; written last

A checkpoint is written as `step_000000100.tmp-<token>`, flushed to the disk, and renamed when all ranks are done. So a
folder was complete when it got its final name. The checksum is zlib's crc32. It finds every flipped bit and every burst of
up to 32; at 4 GB/s a core it costs less than the disk. `safe.py` defends against forgers, the checksum does not.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from neox_native.durable import sync_file
from neox_native.errors import UserError, in_words, naming
from neox_native.plain_files import is_plain_name, read_json

MANIFEST = "manifest.json"
METADATA = "metadata.json"
HASHES = "hashes.json"
HASH_FORMAT = 1
"""Of what `hashes.py` computes: hashes of other formats are not compared."""
READ_BYTES = 1 << 22
LARGE_BYTES = 1 << 20

Record = dict[str, Any]
"""What the manifest holds of one file: {"bytes": size, "crc32": eight hex digits}."""


def step_folder(directory: Path, step: int) -> Path:
    """Folder of the checkpoint of `step`."""
    return Path(directory) / f"step_{step:09d}"


def step_of(path: Path) -> int | None:
    """Step of a checkpoint folder, or None where the name is not one of a finished checkpoint."""
    match = re.fullmatch(r"step_([0-9]{9,})", Path(path).name)
    return int(match.group(1)) if match else None


def finished(directory: Path) -> list[Path]:
    """Folders under their final names, newest step first; empty where there is no such directory.

    Raises `UserError` where it may not be read.
    """
    directory = Path(directory)
    try:
        if not directory.is_dir():
            return []
        found = [path for path in directory.iterdir() if step_of(path) is not None and path.is_dir()]
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {in_words(error)}.") from None
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


class ChecksumStream(io.BufferedWriter):
    """A file opened for writing that knows its crc32 and its size [bytes], and that is on the disk when it is closed.

    A second thread computes the checksum of a large piece while the piece is written: neither holds Python's lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(io.FileIO(path, "wb"), buffer_size=1 << 20)
        self.crc32 = 0
        self.size = 0
        self._helper = ThreadPoolExecutor(max_workers=1)

    def write(self, data: Any) -> int:
        with naming(self.path):
            if len(data) < LARGE_BYTES:
                self.crc32 = zlib.crc32(data, self.crc32)
                written = super().write(data)
            else:
                crc32 = self._helper.submit(zlib.crc32, data, self.crc32)
                try:
                    written = super().write(data)
                finally:
                    self.crc32 = crc32.result()  # the helper must have left `data` before it goes
        self.size += written
        return written

    def close(self) -> None:
        if self.closed:
            return
        self._helper.shutdown()
        with naming(self.path):
            try:
                sync_file(self)
            finally:
                super().close()

    @property
    def record(self) -> Record:
        """Size and checksum so far, as the manifest holds them."""
        return {"bytes": self.size, "crc32": f"{self.crc32:08x}"}


def write_json(path: Path, value: Any) -> Record:
    """Write `value` as JSON, flushed to the disk; returns the file's record."""
    with ChecksumStream(path) as stream:
        stream.write(json.dumps(value, indent=1, sort_keys=True).encode())
    return stream.record


def read_manifest(path: Path) -> dict[str, Record]:
    """Records of a checkpoint's files by name. Raises `UserError` naming the file that is missing or damaged."""
    manifest = Path(path) / MANIFEST
    records = read_json(manifest, missing="this is not a complete checkpoint").get("files")
    if not isinstance(records, dict) or not all(map(_is_record, records.values())):
        raise UserError(f"{manifest} is damaged: it does not tell the size and the crc32 of each file.")
    elsewhere = next((name for name in records if not is_plain_name(name)), None)
    if elsewhere is not None:
        raise UserError(f"{manifest} is refused: it lists {ascii(elsewhere)[:100]}, which is no file of this checkpoint.")
    return records


def _is_record(value: Any) -> bool:
    known = isinstance(value, dict) and value.keys() == {"bytes", "crc32"}
    if not known or type(value["bytes"]) is not int or type(value["crc32"]) is not str:
        return False
    return 0 <= value["bytes"] < 1 << 63 and re.fullmatch("[0-9a-f]{8}", value["crc32"]) is not None


def damage(file: Path, record: Record) -> str | None:
    """What is wrong with a file, as a sentence that names it, or None; reads the whole file."""
    if not file.is_file():
        return f"{file} is missing"
    size = file.stat().st_size
    if size != record["bytes"]:
        return f"{file} has {size} bytes, its manifest says {record['bytes']}"
    crc32 = 0
    with open(file, "rb", buffering=0) as stream:
        while data := stream.read(READ_BYTES):
            crc32 = zlib.crc32(data, crc32)
    if f"{crc32:08x}" != record["crc32"]:
        return f"{file} is damaged: its crc32 is {crc32:08x}, its manifest says {record['crc32']}"
    return None


def wrong_step(path: Path) -> str | None:
    """A sentence where a checkpoint and its folder's name tell different steps; else None."""
    named = step_of(Path(path).absolute())
    told = read_metadata(path).get("step", named)
    if named is None or told == named:
        return None
    return f"{Path(path) / METADATA} is of step {told!r:.20}, but its folder's name is of step {named}; mend the name"


def read_metadata(path: Path) -> dict[str, Any]:
    """What the run said about itself when it saved: the JSON given to `save`. Raises `UserError` where it is not
    whole."""
    file = Path(path) / METADATA
    record = read_manifest(path).get(METADATA)
    if record is None:
        raise UserError(f"{Path(path) / MANIFEST} does not list {METADATA}: this is not a checkpoint of this program.")
    return _read_sound(file, record)


def _read_sound(file: Path, record: Record) -> dict[str, Any]:
    """The JSON of a file of a checkpoint. Raises `UserError` where it is not what its record says."""
    problem = damage(file, record)
    if problem is not None:
        raise UserError(problem + ".")
    return read_json(file)


def write_hashes(path: Path, tensors: Mapping[str, str]) -> Record:
    """Write the hash of each tensor, and that of all, flushed to the disk; returns the file's record."""
    return write_json(path / HASHES, {"format": HASH_FORMAT, "state": state_hash(tensors), "tensors": dict(tensors)})


def state_hash(tensors: Mapping[str, str]) -> str:
    """One hash of the names and the hashes of all tensors."""
    lines = "".join(f"{name} {tensors[name]}\n" for name in sorted(tensors))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def read_hashes(path: Path) -> dict[str, str] | None:
    """The hash of each tensor of a checkpoint; None where it tells none, as those of earlier versions. Raises `UserError` where
    the file is not whole."""
    file, record = Path(path) / HASHES, read_manifest(path).get(HASHES)
    if record is None:
        return None
    told = _read_sound(file, record)
    tensors = told.get("tensors")
    if told.get("format") != HASH_FORMAT:
        return None
    if not isinstance(tensors, dict) or not all(isinstance(each, str) for each in tensors.values()):
        raise UserError(f"{file} is refused: it does not tell the hash of each tensor.")
    return tensors
