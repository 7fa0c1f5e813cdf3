"""Reading a checkpoint runs no code of its author.

DCP's index `.metadata` is a pickle, and an ordinary unpickler imports and calls whatever the file names. Here the
unpickler knows DCP's own data classes and nothing else; tensors are read with `weights_only=True`; entries that are
pickled objects rather than tensors are refused; and the index may only point at files that the manifest lists.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

from neox_native.checkpoint.files import read_manifest
from neox_native.errors import UserError

INDEX = ".metadata"

ALLOWED = frozenset(
    [("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )]
    + [("torch.distributed.checkpoint.filesystem", "_StorageInfo")]
    + [("torch", "Size"), ("torch.serialization", "_get_layout")]
    + [(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")]
)
"""(module, name) of everything that DCP writes into its index: plain data classes without side effects."""


class _DcpUnpickler(pickle.Unpickler):
    """An unpickler that admits `ALLOWED` and torch's dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UserError(f"it asks for {module}.{name}, which no checkpoint needs and which could run code")


def read_index(path: Path) -> Metadata:
    """DCP's index of the checkpoint in `path`, read without running code.

    Raises `UserError` where it asks for anything but DCP's data classes, is no index, or points outside the checkpoint.
    """
    file = Path(path) / INDEX
    try:
        index = _DcpUnpickler(io.BytesIO(file.read_bytes())).load()
    except UserError as error:
        raise UserError(f"{file} is refused: {error}.") from None
    except FileNotFoundError:
        raise UserError(f"{file} is missing: this is not a complete checkpoint.") from None
    except Exception as error:
        raise UserError(f"{file} is damaged: {type(error).__name__}: {error}.") from None
    problem = _problem(index, read_manifest(path))
    if problem is not None:
        raise UserError(f"{file} is refused: {problem}.")
    return index


def _problem(index: Any, files: Mapping[str, Any]) -> str | None:
    """What keeps an unpickled object from being DCP's index of these files, or None.

    Pickle fills the admitted classes with whatever the file says, so no field has its type for granted.
    """
    if not isinstance(index, Metadata):
        return f"it holds a {type(index).__name__}, not DCP's index"
    entries, places = getattr(index, "state_dict_metadata", None), getattr(index, "storage_data", None)
    if not isinstance(entries, dict) or not isinstance(places, dict):
        return "it lists no tensors, or not where they lie"
    for name, entry in entries.items():
        if not isinstance(name, str) or not _is_entry(entry):
            return f"what it says of {name!r} is no tensor's size and boxes"
    for index_of, place in places.items():
        if not isinstance(index_of, MetadataIndex) or not _is_place(place):
            return "a place of a tensor is not a file, an offset and a length"
        if place.relative_path not in files or Path(place.relative_path).name != place.relative_path:
            return f"it points at {place.relative_path}, which is no file of this checkpoint"
    boxes = [MetadataIndex(name, box.offsets) for name, entry in entries.items() for box in getattr(entry, "chunks", ())]
    lost = next((box.fqn for box in boxes if box not in places), None)
    return None if lost is None else f"it does not say where a part of {lost} lies"


def _is_entry(entry: Any) -> bool:
    """Whether it is what DCP notes of a tensor, of the types it has, or the mark of a pickled object."""
    if isinstance(entry, BytesStorageMetadata):
        return True
    if not isinstance(entry, TensorStorageMetadata):
        return False
    fields, chunks = vars(entry), vars(entry).get("chunks")
    known = isinstance(fields.get("properties"), TensorProperties) and _is_shape(fields.get("size"))
    return known and isinstance(chunks, list) and all(
        isinstance(chunk, ChunkStorageMetadata)
        and _is_shape(vars(chunk).get("offsets"))
        and _is_shape(vars(chunk).get("sizes"))
        and len(chunk.offsets) == len(chunk.sizes) == len(entry.size)
        for chunk in chunks
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(size, int) and size >= 0 for size in value)


def _is_place(place: Any) -> bool:
    fields = vars(place) if isinstance(place, _StorageInfo) else {}
    numbers = fields.get("offset"), fields.get("length")
    return isinstance(fields.get("relative_path"), str) and _is_shape(numbers)


class SafeReader(FileSystemReader):
    """DCP's file reader with an index that `read_index` has read."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        try:
            return super().read_data(plan, planner)
        except pickle.UnpicklingError:
            message = f"a shard of {self.path} is refused: it holds pickled objects where tensors belong."
            raise UserError(message) from None


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's planner for a flat dict of tensors; it never unpickles an object."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise UserError(f"{read_item.dest_index.fqn} is a pickled object; only tensors are loaded.")
