"""Which tokens a sample is made of and which samples a step consumes: pure arithmetic, no files, no ranks.

[Note: order terms] A *document* is one sequence of a token file. *Packing* lays the documents of a split end to end
and cuts the stream into *samples* of S + 1 tokens; neighbours share one token, because the last token of one is the
first target of the next. A *segment* (document, offset, length) is the part of a sample that lies in one document.

The order "neox" is GPT-NeoX's to the token: `np.random.RandomState` is frozen by NumPy, so a seed means the same
order for ever.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """`length` tokens of `document`, from `offset` on [tokens]."""

    document: int
    offset: int
    length: int


def split_documents(shares: list[float], num_documents: int) -> list[range]:
    """Contiguous document ranges of train, validation and test, rounded as GPT-NeoX rounds them.

    What rounding adds beyond the last document is taken off every boundary but the first.
    """
    fractions = [share / sum(shares) for share in shares]
    bounds = [0]
    for fraction in fractions:
        bounds.append(bounds[-1] + int(round(fraction * float(num_documents))))
    overshoot = bounds[-1] - num_documents
    bounds = [0] + [bound - overshoot for bound in bounds[1:]]
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:])]


def epochs_needed(tokens_per_epoch: int, seq_length: int, num_samples: int) -> int:
    """Smallest E >= 1 whose stream of E epochs holds `num_samples` packed samples: (E T - 1) // S >= num_samples."""
    return max(1, -(-(num_samples * seq_length + 1) // tokens_per_epoch))


def shuffled_samples(num_samples: int, rng: np.random.RandomState) -> np.ndarray:
    """A permutation of [0, num_samples), in the narrow type that GPT-NeoX uses (the type does not change the
    draw)."""
    order = np.arange(num_samples, dtype=np.uint32 if num_samples < 2**32 - 2 else np.int64)
    rng.shuffle(order)
    return order


class PackedStream:
    """Documents laid end to end and cut every S tokens; see [Note: order terms].

    No sample index is stored: a binary search in the running total costs no more than reading the sample.
    """

    def __init__(self, document_order: np.ndarray, sizes: np.ndarray, seq_length: int) -> None:
        self.document_order, self.seq_length = document_order, seq_length
        self._end = np.cumsum(sizes[document_order], dtype=np.int64)
        """Stream position just behind each document [tokens]."""
        self.num_samples = max(0, int(self._end[-1]) - 1) // seq_length if len(self._end) else 0

    def start(self, sample: int) -> tuple[int, int]:
        """Position in `document_order` and offset in that document of the sample's first token."""
        if sample == 0:
            return 0, 0
        position = int(self._end.searchsorted(sample * self.seq_length, side="right"))
        return position, sample * self.seq_length - (int(self._end[position - 1]) if position else 0)

    def segments(self, sample: int) -> list[Segment]:
        """The S + 1 tokens of one sample, in reading order; empty documents leave no segment."""
        position, offset = self.start(sample)
        stream_position = sample * self.seq_length
        stop = stream_position + self.seq_length + 1
        found = []
        while stream_position < stop:
            length = min(int(self._end[position]), stop) - stream_position
            if length:
                found.append(Segment(int(self.document_order[position]), offset, length))
            stream_position += length
            position, offset = position + 1, 0
        return found


class NeoxOrder:
    """The packed order of GPT-NeoX: all epochs' documents shuffled together, then all samples.

    `sizes` are the tokens of *every* sequence of the file, `documents` the split's range of them. The split must
    hold at least S + 1 tokens. `num_samples` is what the run needs; it decides the number of epochs, and through it
    the order.
    """

    def __init__(self, documents: range, sizes: np.ndarray, seq_length: int, num_samples: int, seed: int) -> None:
        tokens_per_epoch = int(sizes[documents.start : documents.stop].sum(dtype=np.int64))
        self.epochs = epochs_needed(tokens_per_epoch, seq_length, num_samples)
        rng = np.random.RandomState(seed)
        document_order = np.tile(np.arange(documents.start, documents.stop, dtype=np.int32), self.epochs)
        rng.shuffle(document_order)
        self.stream = PackedStream(document_order, sizes, seq_length)
        self.shuffle = shuffled_samples(self.stream.num_samples, rng)
        self.num_samples = self.stream.num_samples

    def segments(self, sample: int) -> list[Segment]:
        """The tokens of the stream's sample number `sample`."""
        return self.stream.segments(int(self.shuffle[sample]))


def rows_of_rank(num_rows: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> np.ndarray:
    """Rows of a step's global batch that one data rank reads, int64 [microbatches, micro_batch_size].

    Row b of microbatch g on rank r is g * dp * micro + r * micro + b: the set of a step depends on its global batch
    size alone.
    """
    assert num_rows % (micro_batch_size * dp_size) == 0, (num_rows, micro_batch_size, dp_size)
    return np.arange(num_rows, dtype=np.int64).reshape(-1, dp_size, micro_batch_size)[:, dp_rank]
