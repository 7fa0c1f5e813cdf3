"""Batches for one data rank: read ahead by threads, resumed from one integer.

[Note: position] The position in the data is `consumed_samples`, the number of samples that the trainer has taken. It alone
decides what comes next; the number of ranks, the microbatch and even the global batch size may change between runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torchdata.nodes import BaseNode, IterableWrapper, ParallelMapper, Prefetcher

from neox_native.data.dataset import Dataset, Row
from neox_native.data.indexed import IGNORED
from neox_native.data.order import rows_of_rank
from neox_native.errors import UserError


@dataclass(frozen=True)
class StepBatch:
    """What one data rank feeds the model in one step; m microbatches of B sequences of T tokens."""

    model_fields: dict[str, torch.Tensor]
    """Arguments of the model's forward, int64 [m, B, T]. tokens_BT; targets_BT: the token that follows each, -100 where the
    model is not trained to predict it; documents_BT if `data.document_attention`: number of the token's document in its
    row, padding has its own; positions_BT if `data.document_positions`: tokens since the start of the document, or of the
    row inside it."""
    loss_fields: dict[str, torch.Tensor]
    """What the objective needs beside the model's values, [m, B, ...]."""
    consumed_samples: int
    """Samples taken by all ranks together, this step included; see [Note: position]."""
    row_hash: int
    """Sum over this rank's rows of `hash_row`, as a signed 64-bit integer; its sum over ranks is the `batch_hash`."""
    num_targets: int
    """Targets of this rank that are not -100."""


def hash_row(row: int, sample: int, tokens: np.ndarray) -> int:
    """64 bits that stand for a row: its number in the step, its sample number and its S + 1 tokens.

    The first 8 bytes of SHA-256 over the two numbers as int64 and the tokens as int32, everything little-endian.
    """
    digest = hashlib.sha256(np.array([row, sample], "<i8").tobytes())
    digest.update(tokens.astype("<i4").tobytes())
    return int.from_bytes(digest.digest()[:8], "little")


def as_signed(value: int) -> int:
    """The sum modulo 2^64 as int64, the type that ranks can add up (addition wraps alike)."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def format_hash(signed: int) -> str:
    """16 hexadecimal digits of a (summed) `row_hash`."""
    return f"{signed & (2**64 - 1):016x}"


def segment_numbers(lengths: list[int], seq_length: int) -> np.ndarray:
    """For each of a row's S inputs the number of its segment, int64 [S]; padding counts as one more."""
    total = sum(lengths)
    return np.repeat(np.arange(len(lengths) + 1), [*lengths, max(0, seq_length - total)])[:seq_length]


def positions_in_segments(numbers: np.ndarray) -> np.ndarray:
    """Positions that restart at 0 where the segment number changes, int64 [S]."""
    return np.arange(len(numbers)) - numbers.searchsorted(numbers)


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
        reading = self.dataset.reading
        rows = {place: self.dataset.read(first_sample + int(number)) for place, number in np.ndenumerate(self.rows)}
        tokens = np.empty((*self.rows.shape, reading.seq_length + 1), np.int64)
        row_hash = 0
        for place, row in rows.items():
            tokens[place] = row.tokens
            number = int(self.rows[place])
            row_hash += hash_row(number, first_sample + number, row.tokens)
        self._check(first_sample, tokens, "token")
        targets = tokens[..., 1:].copy()
        labelled = {place: row.labels[1:] for place, row in rows.items() if row.labels is not None}
        for place, labels in labelled.items():
            targets[place] = np.where(labels < 0, IGNORED, labels)
        is_target = targets != IGNORED
        if labelled:
            self._check(first_sample, np.where(is_target, targets, 0), "label")
        fields = {"tokens_BT": tokens[..., :-1].copy(), "targets_BT": targets} | self._segments(rows)
        return StepBatch(
            model_fields={name: self._to_torch(array) for name, array in fields.items()},
            loss_fields={},
            consumed_samples=first_sample + self.global_batch_size,
            row_hash=as_signed(row_hash),
            num_targets=int(np.count_nonzero(is_target)),
        )

    def _segments(self, rows: dict[tuple[int, ...], Row]) -> dict[str, np.ndarray]:
        """`documents_BT` and `positions_BT` of a step, where the run asks for them."""
        reading = self.dataset.reading
        if not (reading.document_attention or reading.document_positions):
            return {}
        numbers = np.stack([segment_numbers(row.lengths, reading.seq_length) for row in rows.values()])
        shape = (*self.rows.shape, reading.seq_length)
        found = {"documents_BT": numbers.reshape(shape)} if reading.document_attention else {}
        if reading.document_positions:
            found["positions_BT"] = np.stack([positions_in_segments(row) for row in numbers]).reshape(shape)
        return found

    def _to_torch(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.pin_memory else tensor

    def _check(self, first_sample: int, ids: np.ndarray, kind: str) -> None:
        """Raises `UserError` with the place of the first id [m, B, ...] that the vocabulary lacks."""
        limit = self.dataset.reading.vocab_size
        if ids.max() < limit and ids.min() >= 0:
            return
        *place, column = (int(axis[0]) for axis in np.nonzero((ids >= limit) | (ids < 0)))
        behind = column + (kind == "label")
        prefix, segments = self.dataset.locate(first_sample + int(self.rows[tuple(place)]))
        for document, offset, length in segments:
            if behind < length:
                break
            behind -= length
        raise UserError(
            f"data: {prefix} holds {kind} id {ids[(*place, column)]} in document {document} at token "
            f"{offset + behind}, but model.vocab_size = {limit} allows 0 to {limit - 1}; raise it, or prepare the "
            "text with the tokenizer that the model is for."
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
) -> Iterator[StepBatch]:
    """Yields `stop_after_steps` steps from sample `consumed_samples` on; nothing before it is read or skipped over.

    One thread reads, and two finished steps wait for the trainer. `global_batch_size` must be a multiple of
    dp_size * micro_batch_size. Raises `UserError` for data that ends too early and, with the step that holds it, for a
    token id outside the vocabulary.
    """
    end = consumed_samples + stop_after_steps * global_batch_size
    if end > dataset.num_samples:
        raise UserError(
            f"data: the run needs sample {end - 1:,}, but there are {dataset.num_samples:,} ({dataset.describe()}); "
            "lower training.steps or training.global_batch_size, or give more text."
        )
    rows = rows_of_rank(global_batch_size, micro_batch_size, dp_rank, dp_size)
    reader = StepReader(dataset, rows, global_batch_size, pin_memory)
    first_samples = IterableWrapper(range(consumed_samples, end, global_batch_size))
    return _steps(Prefetcher(ParallelMapper(first_samples, reader, num_workers=1, method="thread"), prefetch_factor=2))


def _steps(node: BaseNode[StepBatch | Exception]) -> Iterator[StepBatch]:
    """The node's steps; raises the errors among them. Leaves no reference cycle behind, so that the threads of the node
    are stopped here and not by a garbage collection in one of them."""
    for step in node:
        if isinstance(step, Exception):
            try:
                raise step
            finally:
                del step, node
        yield step
