"""What DCP needs to write a checkpoint's shards here: files that are noted and flushed, tensors that are hashed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem

from neox_native.checkpoint import files
from neox_native.hashes import box_hash
from neox_native.zero.state import Boxes


class _RecordingFileSystem(FileSystem):
    """DCP's file system, noting size and checksum of what is written."""

    def __init__(self) -> None:
        self.records: dict[str, files.Record] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[files.ChecksumStream]:
        assert mode == "wb", f"a checkpoint is written in one go, not in mode {mode}"
        with files.ChecksumStream(Path(path)) as stream:
            yield stream
        self.records[Path(path).name] = stream.record

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class Writer(dcp.FileSystemWriter):
    """DCP's file writer over the recording file system; the index does not tell where it was written."""

    def __init__(self, path: Path, from_host: bool, file_per_tensor: bool) -> None:
        # Copying ahead from a GPU needs a stream of it; a background thread with host copies shall not touch the GPU.
        ahead = {"per_thread_copy_ahead": 0} if from_host else {}
        # The files of `_RecordingFileSystem` flush themselves to the disk; DCP would sync before they are flushed.
        super().__init__(path, single_file_per_rank=not file_per_tensor, sync_files=False, **ahead)
        self.fs = _RecordingFileSystem()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class SavePlanner(dcp.DefaultSavePlanner):
    """DCP's planner for a flat dict of tensors, which may read the numbers from copies on the host. It notes the hash of each
    box that this rank writes, computed by a thread while DCP writes the box: DCP has every box written once."""

    def __init__(self, host_copies: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.host_copies = host_copies
        self.helper = ThreadPoolExecutor(max_workers=1)
        """To be shut down when all is written."""
        self._hashes: dict[MetadataIndex, Future[Tensor]] = {}
        self._last: Future[Tensor] | None = None

    def lookup_object(self, index: Any) -> Tensor:
        if self.host_copies is None:
            return super().lookup_object(index)
        copy, described = self.host_copies[index.fqn], self.state_dict[index.fqn]
        return described.like(copy).__get_tensor_shard__(index) if isinstance(described, Boxes) else copy

    def resolve_data(self, write_item: WriteItem) -> Any:
        if self._last is not None:
            self._last.result()  # the tensor before this one may be let go
        box = super().resolve_data(write_item)
        self._last = self.helper.submit(box_hash, box, write_item.tensor_data.chunk.offsets)
        self._hashes[write_item.index] = self._last
        return box

    def hashes(self) -> dict[str, int]:
        """What this rank's boxes add to the hash of each tensor; waits for the device."""
        found = dict[str, int]()
        for index, future in self._hashes.items():
            found[index.fqn] = found.get(index.fqn, 0) + int(future.result())
        return found
