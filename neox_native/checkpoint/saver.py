"""Saving during a run: in the foreground or in a background thread, and deleting what need not be kept.

[Note: background saves] Training stands still only while the state is copied to buffers in host memory (pinned where
the state is on a GPU, kept from save to save); a thread then writes from there. The thread has a process group of its
own, so that its collectives and those of training cannot mix. The next save waits for the one before, and deletion
runs in the same thread after the rename, so a deletion never meets a save. The price is one host copy of what this
rank writes.
"""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from neox_native.checkpoint import files, store
from neox_native.checkpoint.agree import Ranks
from neox_native.checkpoint.retention import to_delete
from neox_native.config.schema import Checkpoint

EXPORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Saved:
    """What became of one save."""

    step: int
    path: Path
    size_bytes: int
    stall_seconds: float
    """How long training stood still for it, waiting for the save before included."""
    total_seconds: float
    """From the call to the rename."""
    deleted: tuple[int, ...]
    """Steps of the old checkpoints that made way."""

    def __str__(self) -> str:
        gone = f", deleted steps {', '.join(map(str, self.deleted))}" if self.deleted else ""
        return (
            f"step {self.step}: saved {self.size_bytes / 1e9:.3f} GB in {self.total_seconds:.2f} s, "
            f"training stood still for {self.stall_seconds:.3f} s{gone}"
        )


class Saver:
    """Saves the checkpoints of a run. Creating one is a collective, and so are `save`, `wait` and `export`.

    Args:
        directory: the run's `checkpoints/` folder.
        config: the [checkpoint] section.
    """

    def __init__(self, directory: Path, config: Checkpoint) -> None:
        self.directory, self.config = Path(directory), config
        self.last_step: int | None = None
        self._ranks = Ranks()
        self._host_buffers: store.State = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._reports: list[Saved] = []

    def save(self, step: int, state: store.State, metadata: dict[str, Any]) -> None:
        """Save the state after `step` updates, see [Note: state] of `store.py`.

        Returns when the checkpoint is on the disk, or, with `checkpoint.async`, when the state may change again.
        Raises what the save before raised in its thread, on all ranks alike: a `UserError` for a full disk.
        """
        start = time.perf_counter()
        self.wait()
        self.last_step, state = step, store.own_share(state)
        if not self.config.async_:
            self._write(step, state, metadata, None, start, None)
            return
        copies = self._copy_to_host(state)
        stall_seconds = time.perf_counter() - start
        arguments = (step, state, metadata, copies, start, stall_seconds)
        self._thread = threading.Thread(target=self._write_in_thread, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for a save in the background; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def reports(self) -> list[Saved]:
        """Saves finished since the last call, for the log. Does not wait."""
        finished, self._reports = self._reports, []
        return finished

    def export(self, path: Path, state: store.State, metadata: dict[str, Any]) -> Path | None:
        """Write the weights alone for publishing, in the type `checkpoint.export` names; None where it is "none".

        Only names under "model." go in: no optimizer, no generators. `load` reads it like any other checkpoint.
        """
        if self.config.export == "none":
            return None
        self.wait()
        dtype = EXPORT_DTYPES[self.config.export]
        weights = {name: value for name, value in state.items() if name.startswith("model.")}
        cast = {name: value.detach().to(dtype) for name, value in store.own_share(weights).items()}
        return store.write(Path(path), f"Exporting the weights to {path}", cast, metadata, self._ranks)

    def _copy_to_host(self, state: store.State) -> store.State:
        """Copies of the local tensors in host memory, finished when this returns."""
        on_gpu = False
        for name, value in state.items():
            local = (value.to_local() if isinstance(value, DTensor) else value).detach()
            buffer = self._host_buffers.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._host_buffers[name] = buffer
            buffer.copy_(local, non_blocking=True)
            on_gpu = on_gpu or local.is_cuda
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return {name: self._host_buffers[name] for name in state}

    def _write_in_thread(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:  # raised again by `wait`, in the main thread
            self._error = error

    def _write(
        self,
        step: int,
        state: store.State,
        metadata: dict[str, Any],
        host_copies: store.State | None,
        start: float,
        stall_seconds: float | None,
    ) -> None:
        """Write one checkpoint, then delete what retention lets go; without `stall_seconds` all of it was a stall."""
        path = store.save(self.directory, step, state, metadata, self._ranks, host_copies)
        deleted: list[int] = []
        size = 0
        with self._ranks.together("Deleting old checkpoints"):
            if self._ranks.rank == 0:  # alone: the others' view of a network disk may be older
                size = sum(record["bytes"] for record in files.read_manifest(path).values())
                deleted = delete_old(self.directory, step, self.config.keep_last, self.config.keep_every)
        size, deleted = self._ranks.from_first((size, deleted))
        seconds = time.perf_counter() - start
        stall = seconds if stall_seconds is None else stall_seconds
        self._reports.append(Saved(step, path, size, stall, seconds, tuple(deleted)))


def delete_old(directory: Path, saved_step: int, keep_last: int, keep_every: int) -> list[int]:
    """Delete the checkpoints that retention lets go after the save of `saved_step`; returns their steps.

    Later steps are no successors of this one (a damaged checkpoint that was skipped, a run that was rewound): they
    are not counted and not touched. A folder loses its final name first, so that a kill in between leaves none that
    looks complete.
    """
    steps = [files.step_of(path) for path in files.finished(directory)]
    gone = to_delete([step for step in steps if step is not None and step <= saved_step], keep_last, keep_every)
    for step in gone:
        folder = files.step_folder(directory, step)
        doomed = folder.with_name(folder.name + files.TEMPORARY + "deleted")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return gone
