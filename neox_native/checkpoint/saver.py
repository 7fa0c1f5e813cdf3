"""Saving during a run: in the foreground or in a background thread, and deleting what need not be kept.

[Note: background saves] Training stands still only while the state is copied to host memory; a thread then writes from
there. The buffers stay from save to save, pinned where the state is on a GPU: the price is one host copy of what this rank
writes. The thread has a process group of its own, so that its collectives and those of training cannot mix. The next save
waits for the one before. Old checkpoints are deleted in the same thread after the rename, so a deletion never meets a save.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from neox_native.checkpoint import files, store
from neox_native.checkpoint.retention import to_delete
from neox_native.config.schema import Checkpoint
from neox_native.dtypes import DTYPES
from neox_native.durable import remove_folder
from neox_native.errors import UserError
from neox_native.launch import Ranks
from neox_native.units import size
from neox_native.zero.state import Boxes


@dataclass(frozen=True)
class Saved:
    """What became of one save."""

    step: int
    path: Path
    stall_seconds: float
    """How long training stood still for it, waiting for the save before included."""
    total_seconds: float
    """From the call to the rename."""
    size_bytes: int
    deleted: tuple[int, ...]
    """Steps of the old checkpoints that made way."""
    state_hash: str
    """Of all that it holds, the same in every layout."""
    kept_because: str = ""
    """Why one that should make way could not be deleted; "" where all could."""

    def __str__(self) -> str:
        gone = f", deleted steps {', '.join(map(str, self.deleted))}" if self.deleted else ""
        gone += f", could not delete {self.kept_because}" if self.kept_because else ""
        return (
            f"step {self.step}: saved {size(self.size_bytes)} in {self.total_seconds:.2f} s, "
            f"training stood still for {self.stall_seconds:.3f} s{gone}"
        )


@dataclass(frozen=True)
class NotSaved:
    """A save in the background that failed; the next one tries again."""

    step: int | None
    why: str

    def __str__(self) -> str:
        return f"{self.why}; the next save tries again"


class Saver:
    """Saves the checkpoints of a run. Creating one is a collective, and so are `save`, `wait` and `export`.

    Args:
        directory: the run's `checkpoints/` folder.
        config: the [checkpoint] section.
        beside: small files that each of them holds, by name.
    """

    def __init__(self, directory: Path, config: Checkpoint, beside: Mapping[str, bytes] = {}) -> None:
        self.directory, self.config, self.beside = Path(directory), config, beside
        self.last_step: int | None = None
        self._ranks = Ranks()
        self._host_buffers: store.State = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._tries_again = False
        self._passed_over: set[int] = set()
        self._reports: list[Saved | NotSaved] = []

    def save(self, step: int, state: store.State, metadata: dict[str, Any], keep_all: bool = False) -> None:
        """Save the state after `step` updates, see [Note: state] of `store.py`.

        Returns when the checkpoint is on the disk, or, with `checkpoint.async`, when the state may change again.
        Raises on all ranks alike, a `UserError` for a full disk; in the background, where the save before failed too.

        Args:
            keep_all: delete nothing after this save.
        """
        start = time.perf_counter()
        self.settle()
        self.last_step, state = step, store.own_share(state)
        if not self.config.async_:
            self._write(step, state, metadata, None, start, None, keep_all)
            return
        copies = self._copy_to_host(state)
        stall_seconds = time.perf_counter() - start
        arguments = (step, state, metadata, copies, start, stall_seconds, keep_all)
        self._thread = threading.Thread(target=self._write_in_thread, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def pass_over(self, step: int) -> None:
        """The run goes on from `step`: whatever is in the folder from later steps is damaged, and not counted among those that
        are kept until it is saved anew."""
        self._passed_over = {later for path in files.finished(self.directory) if (later := files.step_of(path) or 0) > step}

    @property
    def failed(self) -> bool:
        """Whether this rank has seen a save in the background fail since the last `save` or `settle`. Does not wait; the
        other ranks see it at another moment."""
        return self._error is not None

    def settle(self) -> bool:
        """Wait for a save in the background; whether it failed and the state should be saved again, by a second save.

        Raises what the second one raised, and at once what no second save can mend.
        """
        try:
            self.wait()
        except UserError as error:
            if self._tries_again:
                raise
            self._reports.append(NotSaved(self.last_step, str(error)))
            self._tries_again, self.last_step = True, None
            return True
        return False

    def wait(self) -> None:
        """Wait for a save in the background; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Let a save in the background end, whatever has ended the run."""
        if self._thread is not None:
            self._thread.join()

    def reports(self) -> list[Saved | NotSaved]:
        """Saves finished or failed since the last call, for the log. Does not wait."""
        finished, self._reports = self._reports, []
        return finished

    def export(self, path: Path, state: store.State, metadata: dict[str, Any]) -> Path:
        """Write the weights alone for publishing, in the type that `checkpoint.export` names.

        Only names under "model." go in: no optimizer, no generators. `load` reads it like any other checkpoint.
        """
        self.wait()
        dtype = DTYPES[self.config.export]
        weights = {name: value for name, value in state.items() if name.startswith("model.")}
        cast = {name: value.detach().to(dtype) for name, value in store.own_share(weights).items()}
        return store.write(
            Path(path), f"Exporting the weights to {path}", cast, metadata, self._ranks, beside=self.beside
        )

    def _copy_to_host(self, state: store.State) -> store.State:
        """Copies of the local tensors in host memory, finished when this returns."""
        on_gpu = False
        for name, value in state.items():
            local = (value.to_local() if isinstance(value, DTensor | Boxes) else value).detach()
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
        keep_all: bool,
    ) -> None:
        """Write one checkpoint, then delete what retention lets go; without `stall_seconds` all of it was a stall."""
        path = store.save(self.directory, step, state, metadata, self._ranks, host_copies, self.beside)
        size, deleted, state_hash, kept_because = 0, (), "", ""
        self._passed_over.discard(step)
        with self._ranks.together("Deleting old checkpoints"):
            if self._ranks.is_first:  # alone: the others' view of a network disk may be older
                size = sum(record["bytes"] for record in files.read_manifest(path).values())
                state_hash = files.state_hash(files.read_hashes(path) or {})
                if not keep_all:
                    deleted, kept_because = delete_old(self.directory, step, self.config, self._passed_over)
        told = self._ranks.from_first((size, deleted, state_hash, kept_because))
        self._tries_again = False
        seconds = time.perf_counter() - start
        stall = seconds if stall_seconds is None else stall_seconds
        self._reports.append(Saved(step, path, stall, seconds, *told))


def delete_old(directory: Path, saved_step: int, config: Checkpoint, damaged: set[int]) -> tuple[tuple[int, ...], str]:
    """Delete the checkpoints that retention lets go after the save of `saved_step`; returns their steps, and why one could
    not be deleted: the save is none the worse for it.

    Later steps are no successors of this one (a damaged checkpoint that was skipped, a run that was rewound), and nobody
    could resume from one that lacks a file or is known as `damaged`: they are not counted and not touched. A folder loses
    its final name first, so that a kill in between leaves none that looks complete.
    """
    if config.keep_last <= 0:
        return (), ""
    earlier = {step: path for path in files.finished(directory) if (step := files.step_of(path) or 0) <= saved_step}
    whole = [step for step, path in earlier.items() if step not in damaged and _has_its_files(path)]
    gone = []
    for step in to_delete(whole, config.keep_last, config.keep_every):
        try:
            remove_folder(earlier[step])
        except OSError as error:
            return tuple(gone), f"step {step}: {error.strerror}"
        gone.append(step)
    return tuple(gone), ""


def _has_its_files(path: Path) -> bool:
    """Whether a checkpoint has every file in its full size: what can be told without reading it."""
    try:
        records = files.read_manifest(path)
        return all((path / name).stat().st_size == record["bytes"] for name, record in records.items())
    except (UserError, OSError):
        return False
