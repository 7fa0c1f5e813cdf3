"""Batches for one data rank: read ahead by threads, resumed from one integer.

[Note: position] The position in the data is `consumed_samples`, the number of samples that the trainer has taken. It
alone decides what comes next; the number of ranks, the microbatch and even the global batch size may change between
runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torchdata.nodes import BaseNode, Loader, ParallelMapper, Prefetcher

from neox_native.data.dataset import Dataset
from neox_native.data.order import rows_of_rank
from neox_native.errors import UserError


@dataclass(frozen=True)
class StepBatch:
    """What one data rank feeds the model in one step; m microbatches of B sequences of T tokens."""

    inputs: torch.Tensor
    """int64 [m, B, T]."""
    targets: torch.Tensor
    """int64 [m, B, T]: the token that follows each input token."""
    sample_ids: torch.Tensor
    """int64 [m, B]: numbers of the samples in the dataset's order."""
    consumed_samples: int
    """Samples taken by all ranks together, this step included; see [Note: position]."""
    row_hash: int
    """Sum over this rank's rows of `hash_row`, as a signed 64-bit integer; summed over ranks it is the step's
    `batch_hash`."""


def hash_row(row: int, sample: int, tokens: np.ndarray) -> int:
    """64-bit BLAKE2b hash of a row's number in its step, its sample number and its S + 1 tokens, all as
    little-endian int64."""
    digest = hashlib.blake2b(np.array([row, sample], "<i8").tobytes(), digest_size=8)
    digest.update(tokens.astype("<i8", copy=False).tobytes())
    return int.from_bytes(digest.digest(), "little")


def as_signed(value: int) -> int:
    """The sum modulo 2^64 as int64, the type that ranks can add up (addition wraps alike)."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def format_hash(signed: int) -> str:
    """16 hexadecimal digits of a (summed) `row_hash`."""
    return f"{signed & (2**64 - 1):016x}"


class StepIndex(BaseNode[int]):
    """The first sample of each coming step. Its whole state is `consumed_samples`."""

    def __init__(self, consumed_samples: int, global_batch_size: int, num_steps: int) -> None:
        super().__init__()
        self.first, self.global_batch_size = consumed_samples, global_batch_size
        self.stop = consumed_samples + num_steps * global_batch_size
        self.consumed_samples = consumed_samples

    def reset(self, initial_state: dict[str, int] | None = None) -> None:
        """Starts at the given state, or at the first sample."""
        super().reset(initial_state)
        self.consumed_samples = initial_state["consumed_samples"] if initial_state else self.first

    def next(self) -> int:
        """First sample of the next step."""
        if self.consumed_samples >= self.stop:
            raise StopIteration
        self.consumed_samples += self.global_batch_size
        return self.consumed_samples - self.global_batch_size

    def get_state(self) -> dict[str, int]:
        """The one integer."""
        return {"consumed_samples": self.consumed_samples}


class StepReader:
    """Reads one data rank's rows of a step; called by the threads of the loader."""

    def __init__(self, dataset: Dataset, rows: np.ndarray, global_batch_size: int, pin_memory: bool) -> None:
        self.dataset, self.rows, self.global_batch_size = dataset, rows, global_batch_size
        self.pin_memory = pin_memory

    def __call__(self, first_sample: int) -> StepBatch | Exception:
        """The step that starts at `first_sample`. An error is handed over as a value: it belongs in the trainer's
        thread."""
        try:
            return self.read(first_sample)
        except Exception as error:
            return error

    def read(self, first_sample: int) -> StepBatch:
        """Reads, checks and hashes the rows."""
        tokens = np.empty((*self.rows.shape, self.dataset.seq_length + 1), np.int64)
        total = 0
        for place, row in np.ndenumerate(self.rows):
            sample = first_sample + int(row)
            tokens[place] = self.dataset.sample(sample)
            total += hash_row(int(row), sample, tokens[place])
        if tokens.max() >= self.dataset.vocab_size or tokens.min() < 0:
            self._refuse(first_sample, tokens)
        whole = torch.from_numpy(tokens)
        inputs, targets = whole[..., :-1].contiguous(), whole[..., 1:].contiguous()
        sample_ids = torch.from_numpy(first_sample + self.rows)
        if self.pin_memory:
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return StepBatch(inputs, targets, sample_ids, first_sample + self.global_batch_size, as_signed(total))

    def _refuse(self, first_sample: int, tokens: np.ndarray) -> None:
        *place, column = (int(axis[0]) for axis in np.nonzero((tokens >= self.dataset.vocab_size) | (tokens < 0)))
        prefix, segments = self.dataset.locate(first_sample + int(self.rows[tuple(place)]))
        behind = column
        for document, offset, length in segments:
            if behind < length:
                break
            behind -= length
        raise UserError(
            f"data: {prefix} holds token id {tokens[(*place, column)]} in document {document} at token "
            f"{offset + behind}, but "
            f"model.vocab_size = {self.dataset.vocab_size} allows 0 to {self.dataset.vocab_size - 1}; "
            "raise it, or prepare the text with the tokenizer that the model is for."
        )


def build_loader(
    dataset: Dataset,
    *,
    consumed_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    stop_after_steps: int,
    pin_memory: bool = False,
    num_threads: int = 1,
    steps_ahead: int = 2,
) -> Iterator[StepBatch]:
    """Yields `stop_after_steps` steps from sample `consumed_samples` on; nothing before it is read or skipped over.

    `num_threads` threads read, and `steps_ahead` finished steps wait for the trainer. `global_batch_size` must
    divide into dp_size * micro_batch_size. Raises `UserError` for a token id outside the vocabulary and for data
    that ends too early.
    """
    end = consumed_samples + stop_after_steps * global_batch_size
    if end > dataset.num_samples:
        raise UserError(
            f"data: the run needs sample {end - 1:,}, but there are {dataset.num_samples:,} ({dataset.describe()}); "
            "lower training.steps or training.global_batch_size, or give more text."
        )
    rows = rows_of_rank(global_batch_size, micro_batch_size, dp_rank, dp_size)
    reader = StepReader(dataset, rows, global_batch_size, pin_memory)
    index = StepIndex(consumed_samples, global_batch_size, stop_after_steps)
    mapper = ParallelMapper(index, reader, num_workers=num_threads, method="thread")
    return _raise_errors(Loader(Prefetcher(mapper, prefetch_factor=steps_ahead)))


def _raise_errors(steps: Iterable[StepBatch | Exception]) -> Iterator[StepBatch]:
    for step in steps:
        if isinstance(step, Exception):
            raise step
        yield step
