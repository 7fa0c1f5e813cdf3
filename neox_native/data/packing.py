"""Documents cut into samples: pure arithmetic on sizes.

[Note: packing terms] A *document* is one sequence of a token file. A *stream* is documents laid end to end. A
*sample* is what the model reads at once: S + 1 tokens, of which the first S are inputs and the last S targets. A
*segment* (document, offset, length) is the part of a sample that lies in one document. Three ways to cut a stream:

- "packed": every S tokens, across documents; neighbours share one token, the last target of one is the first input
of the next.
- "pack_until_overflow": whole documents as long as they fit in S + 1 tokens; the rest of the sample is padding.
- "unpacked": one document a sample, padded.

In the last two, what a document has beyond S + 1 tokens is not read.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import numpy as np

PIECE = 2**17
"""Elements."""
Packing = Literal["packed", "pack_until_overflow", "unpacked"]


class Segment(NamedTuple):
    """`length` tokens of `document`, from `offset` on [tokens]."""

    document: int
    offset: int
    length: int


class Stream(Protocol):
    """Documents in an order, cut into samples."""

    num_samples: int

    def segments(self, sample: int) -> list[Segment]:
        """The tokens of one sample in reading order, at most S + 1; empty documents leave no segment."""

    def samples_of(self, document: int) -> np.ndarray:
        """Samples that hold at least one token of a document, ascending, int64."""


class PackedStream(Stream):
    """A stream cut every S tokens.

    No sample index is stored: a binary search in the running total costs no more than reading the sample.

    Args:
        document_order: documents as they follow one another.
        ends: stream position just behind each of them [tokens], see `ends_in_stream`.
    """

    def __init__(self, document_order: np.ndarray, ends: np.ndarray, seq_length: int) -> None:
        self.document_order, self._end, self.seq_length = document_order, ends, seq_length
        self.num_samples = max(0, int(self._end[-1]) - 1) // seq_length if len(self._end) else 0

    def segments(self, sample: int) -> list[Segment]:
        """See `Stream.segments`; always S + 1 tokens."""
        stream_position = sample * self.seq_length
        stop = stream_position + self.seq_length + 1
        position = int(self._end.searchsorted(stream_position, side="right"))
        offset = stream_position - (int(self._end[position - 1]) if position else 0)
        found = []
        while stream_position < stop:
            length = min(int(self._end[position]), stop) - stream_position
            if length:
                found.append(Segment(int(self.document_order[position]), offset, length))
            stream_position += length
            position, offset = position + 1, 0
        return found

    def samples_of(self, document: int) -> np.ndarray:
        found = []
        for position in np.flatnonzero(self.document_order == document):
            start, stop = int(self._end[position - 1]) if position else 0, int(self._end[position])
            if start < stop:
                first, last = (start - 1) // self.seq_length, (stop - 1) // self.seq_length
                found.append(np.arange(max(first, 0), min(last + 1, self.num_samples)))
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)


def ends_in_stream(document_order: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Running total of the documents' sizes [tokens], int64, computed by pieces that stay in the processor's cache."""
    ends, total = np.empty(len(document_order), np.int64), 0
    for start in range(0, len(ends), PIECE):
        piece = ends[start : start + PIECE]
        np.cumsum(sizes[document_order[start : start + PIECE]], out=piece)
        piece += total
        total = int(piece[-1])
    return ends


class WholeDocuments(Stream):
    """A stream cut between documents: sample k has the documents at positions starts[k] to starts[k + 1]."""

    def __init__(self, document_order: np.ndarray, sizes: np.ndarray, seq_length: int, starts: np.ndarray) -> None:
        self.document_order, self.sizes, self.capacity, self.starts = document_order, sizes, seq_length + 1, starts
        self.num_samples = len(starts) - 1

    def segments(self, sample: int) -> list[Segment]:
        documents = self.document_order[self.starts[sample] : self.starts[sample + 1]].tolist()
        return [Segment(document, 0, min(int(self.sizes[document]), self.capacity)) for document in documents]

    def samples_of(self, document: int) -> np.ndarray:
        positions = np.flatnonzero(self.document_order == document)
        samples = np.unique(self.starts.searchsorted(positions, side="right") - 1)
        return samples[samples < self.num_samples]


def starts_of_samples(lengths: np.ndarray, seq_length: int, packing: Packing) -> np.ndarray:
    """Position of each sample's first document and, at the end, the number of documents, int64 [samples + 1].

    `lengths` [documents] are positive. "pack_until_overflow" starts a sample where the next document would pass S +
    1 tokens.
    """
    if packing == "unpacked":
        return np.arange(len(lengths) + 1)
    end = np.cumsum(lengths, dtype=np.int64)
    fits_until = end.searchsorted(end - lengths + seq_length + 1, side="right")
    following = np.maximum(fits_until, np.arange(1, len(lengths) + 1)).tolist()
    starts = [0]
    while starts[-1] < len(lengths):
        starts.append(following[starts[-1]])
    return np.array(starts, np.int64)
