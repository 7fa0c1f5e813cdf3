"""Reading a checkpoint runs no code of its author.

DCP's index `.metadata` is a pickle, and an ordinary unpickler imports, calls and changes whatever the file names. Here
`inert.py` reads it as data, and DCP's own data classes are made of what has their form; tensors are read with
`weights_only=True` after `torch_files.py` has looked at them; entries that are pickled objects rather than tensors are refused; and the index may only point into
files that the manifest lists.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from neox_native.checkpoint import inert
from neox_native.checkpoint.files import Record, read_manifest
from neox_native.checkpoint.torch_files import Piece, look_at
from neox_native.errors import UserError
from neox_native.plain_files import read_bytes

INDEX = ".metadata"
MAX_INDEX_BYTES = 1 << 28
"""Largest index that is read: about two million boxes. Read as records, it takes some fifty times its size at worst."""
MAX_DIMS = 64
MAX_FIELDS = 16
DCP = "torch.distributed.checkpoint"

ALLOWED = frozenset(
    [(f"{DCP}.metadata", name) for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )]
    + [(f"{DCP}.filesystem", "_StorageInfo")]
    + [("torch", "Size"), ("torch.serialization", "_get_layout")]
    + [(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")]
)
"""(module, name) of everything that DCP writes into its index: plain data classes."""
DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def read_index(path: Path) -> Metadata:
    """DCP's index of the checkpoint in `path`, read without running code: its tensors and where they lie.

    Raises `UserError` where it asks for anything but DCP's data classes, is no index, or points outside the checkpoint.
    """
    file = Path(path) / INDEX
    records = read_manifest(path)
    data = read_bytes(file, MAX_INDEX_BYTES, missing="this is not a complete checkpoint")
    try:
        return parse_index(data, records)
    except UserError as error:
        raise UserError(f"{file} is refused: {error}.") from None


def _admits(module: str, name: str) -> bool:
    return (module, name) in ALLOWED or f"{module}.{name}" in DTYPES


def parse_index(data: bytes, files: Mapping[str, Record]) -> Metadata:
    """DCP's index of these files. It may hold anything: no field has its type for granted.

    Raises `UserError`, the second half of a sentence that begins with the index's name.
    """
    fields = _fields(inert.read(data, _admits), "metadata.Metadata")
    entries, places = fields.get("state_dict_metadata"), fields.get("storage_data")
    if type(entries) is not inert.Table or type(places) is not inert.Table:
        raise UserError("it lists no tensors, or not where they lie")
    storage = {_box_name(box): _place(place, files) for box, place in places}
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    boxes = 0
    for name, entry in entries:
        if type(name) is not str or name in tensors:
            raise UserError("the name of a tensor is no text, or there twice")
        tensors[name] = _entry(name, entry, len(storage) - boxes)
        for box in getattr(tensors[name], "chunks", ()):
            boxes += 1
            if MetadataIndex(name, box.offsets) not in storage:
                raise UserError(f"it does not say where a part of {name} lies")
    return Metadata(tensors, storage_data=storage)


def _fields(found: Any, kind: str) -> dict[str, Any]:
    """The attributes of a data class of DCP's."""
    if type(found) is not inert.Record or found.name != f"{DCP}.{kind}" or found.arguments:
        raise UserError(f"it holds something else where a {kind} belongs")
    state = inert.Table() if found.state is None else found.state
    if type(state) is not inert.Table or len(state) > MAX_FIELDS or any(type(name) is not str for name, _ in state):
        raise UserError(f"what it says of a {kind} is not what DCP writes")
    return dict(state)


def _entry(name: str, found: Any, most: int) -> TensorStorageMetadata | BytesStorageMetadata:
    """What DCP notes of a tensor, in `most` boxes or fewer, or the mark of a pickled object."""
    if type(found) is inert.Record and found.name == f"{DCP}.metadata.BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(found, "metadata.TensorStorageMetadata")
    size, chunks = _shape(fields.get("size")), fields.get("chunks")
    if type(chunks) is not list or len(chunks) > most:
        raise UserError(f"it does not say where a part of {name} lies")
    boxes = [_box(chunk) for chunk in chunks]
    for box in boxes:
        inside = len(box.offsets) == len(box.sizes) == len(size)
        if not inside or any(start + length > end for start, length, end in zip(box.offsets, box.sizes, size)):
            raise UserError(f"a part of {name} lies outside of it")
    return TensorStorageMetadata(_properties(fields.get("properties")), size, boxes)


def _properties(found: Any) -> TensorProperties:
    """The type of a tensor; what DCP calls deprecated beside it is not looked at."""
    known = type(found) is inert.Record and found.name == f"{DCP}.metadata.TensorProperties"
    dtype = found.state[0] if known and type(found.state) is tuple and len(found.state) == 5 else None
    if type(dtype) is not inert.Global or dtype.name not in DTYPES:
        raise UserError("the type of a tensor is none of torch's")
    return TensorProperties(DTYPES[dtype.name])


def _box(found: Any) -> ChunkStorageMetadata:
    fields = _fields(found, "metadata.ChunkStorageMetadata")
    return ChunkStorageMetadata(_shape(fields.get("offsets")), _shape(fields.get("sizes")))


def _box_name(found: Any) -> MetadataIndex:
    fields = _fields(found, "metadata.MetadataIndex")
    name, offset, index = fields.get("fqn"), fields.get("offset"), fields.get("index")
    if type(name) is not str or type(index) not in (int, type(None)):
        raise UserError("the name of a part is not what DCP writes")
    return MetadataIndex(name, None if offset is None else _shape(offset), index)


def _shape(found: Any) -> torch.Size:
    """A `torch.Size`: a tuple of a few numbers from 0 on."""
    sizes = found.arguments[0] if type(found) is inert.Record and found.name == "torch.Size" and found.arguments else None
    if type(sizes) is not tuple or len(sizes) > MAX_DIMS or not all(type(size) is int and size >= 0 for size in sizes):
        raise UserError("a shape is no tuple of a few numbers from 0 on")
    return torch.Size(sizes)


def _place(found: Any, files: Mapping[str, Record]) -> _StorageInfo:
    """Where a part lies: within one of these files."""
    fields = _fields(found, "filesystem._StorageInfo")
    file, offset, length = (fields.get(name) for name in ("relative_path", "offset", "length"))
    if type(file) is not str or type(offset) is not int or type(length) is not int:
        raise UserError("a place of a tensor is not a file, an offset and a length")
    if file not in files or "transform_descriptors" in fields:
        raise UserError(f"it points at {file[:100]}, which is no plain file of this checkpoint")
    if offset < 0 or length < 0 or offset + length > files[file]["bytes"]:
        raise UserError(f"it points at bytes {offset} to {offset + length} of {file}, which has {files[file]['bytes']}")
    return _StorageInfo(file, offset, length)


class SafeReader(FileSystemReader):
    """DCP's file reader with an index that `read_index` has read."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index

    def _slice_file(self, file: IO[bytes], sinfo: _StorageInfo) -> Any:
        """A tensor's stretch of a shard, if it is fit for `torch.load`."""
        piece = Piece(file, sinfo.offset, sinfo.length)
        look_at(piece)
        return piece

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        try:
            return super().read_data(plan, planner)
        except UserError as error:
            raise UserError(f"a shard of {self.path} is refused: {error}.") from None
        except OSError:
            raise
        except Exception as error:  # torch.load on what no torch.save wrote, or DCP on a tensor of another shape
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"a shard of {self.path} is refused: it does not hold what its index tells ({said}).") from error


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's planner for a flat dict of tensors; it never unpickles an object."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise UserError(f"{read_item.dest_index.fqn} is a pickled object; only tensors are loaded")
