"""Reading a checkpoint runs no code of its author.

DCP's index `.metadata` is a pickle, and an ordinary unpickler imports and calls whatever the file names. Here the
unpickler knows DCP's own data classes and nothing else; tensors are read with `weights_only=True`; entries that are
pickled objects rather than tensors are refused; and the index may only point at files that the manifest lists.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
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
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise UserError(f"{file} is refused: it holds a {type(index).__name__}, not DCP's index.")
    files = read_manifest(path)
    for place in index.storage_data.values():
        name = place.relative_path
        if name not in files or Path(name).name != name:
            raise UserError(f"{file} is refused: it points at {name}, which is no file of this checkpoint.")
    return index


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
