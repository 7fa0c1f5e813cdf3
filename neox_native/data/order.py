"""Which sample comes when, and which rank reads it: pure arithmetic, no files, no ranks of its own.

`np.random.RandomState` is frozen by NumPy, so that a seed means the same order for ever. The terms are those of
[Note: packing terms]. Three orders:

- "neox": GPT-NeoX's to the token. All epochs that the run needs are shuffled together: a run that is longer from the start may
have another order.
- "epoch": each epoch is shuffled on its own, from (seed, documents, epoch): a longer run continues a shorter one.
- "stored": row i of the file is sample i, for files that were shuffled and cut beforehand, as Pythia's were.

[Note: legs] A run in order "neox" that is made longer keeps what it has drawn, its first leg, which is GPT-NeoX's. Where that
holds too few samples, a further leg follows: as many epochs as suffice, shuffled together from (seed, epochs before it), or, of
whole documents, the further samples, shuffled from (seed, samples before them). The fingerprint tells where each leg ends, so
that the run finds them again, and may be made longer any number of times.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import numpy as np

from neox_native.data.packing import (
    PackedStream,
    Packing,
    Segment,
    Stream,
    WholeDocuments,
    ends_in_stream,
    starts_of_samples,
)
from neox_native.errors import UserError

ENDLESS = 2**62
"""Number of samples of an order that never ends."""
LONG = 10**7
"""Documents over all epochs, or samples, from which on an order is kept on disk [count]: shuffling them takes a second."""

Facts = dict[str, object]
Arrays = dict[str, np.ndarray]
Draw = Callable[[], Arrays]
Keep = Callable[[Facts, Draw], Arrays]
"""Returns the arrays that a draw computes and the facts decide, from the disk where an earlier run has kept them."""


@dataclass(frozen=True)
class Corpus:
    """What an order arranges: a range of the documents of a file, and how they are cut into samples."""

    documents: range
    sizes: np.ndarray
    """Tokens of every document of the file, i32."""
    seq_length: int
    packing: Packing
    usable: np.ndarray | None
    """Whether a document may be read, bool, for every document of the file; None for "packed", which takes them all."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the documents."""
        return int(self.sizes[self.documents.start : self.documents.stop].sum(dtype=np.int64))

    def stream(self, document_order: np.ndarray) -> Stream:
        """The documents in this order, cut into samples; unusable ones are left out."""
        if self.packing == "packed":
            return PackedStream(document_order, ends_in_stream(document_order, self.sizes), self.seq_length)
        assert self.usable is not None, self.packing
        kept = document_order[self.usable[document_order]]
        starts = starts_of_samples(self.sizes[kept], self.seq_length, self.packing)
        return WholeDocuments(kept, self.sizes, self.seq_length, starts)


class Order(Protocol):
    """Samples in the order in which a run reads them."""

    num_samples: int

    def segments(self, sample: int) -> list[Segment]:
        """The tokens of sample number `sample`."""

    def samples_of(self, document: int, stop: int) -> np.ndarray:
        """Which of the samples below `stop` hold a token of a document, ascending, int64."""

    def fingerprint(self) -> dict[str, object]:
        """What the order depends on beside the corpus and the seed."""


def split_documents(shares: list[float], num_documents: int) -> list[range]:
    """Contiguous document ranges, one for each share, rounded as GPT-NeoX rounds them.

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
    """A permutation of [0, num_samples), in the narrow type that GPT-NeoX uses (the type does not change the draw)."""
    order = np.arange(num_samples, dtype=np.uint32 if num_samples < 2**32 - 2 else np.int64)
    rng.shuffle(order)
    return order


def _numbers(documents: range) -> np.ndarray:
    return np.arange(documents.start, documents.stop, dtype=np.int32)


def _counts(told: object) -> list[int]:
    """The counts that an entry of a fingerprint tells, one or a rising list of them."""
    counts = told if isinstance(told, list) else [told]
    rises = all(isinstance(count, int) for count in counts) and all(a < b for a, b in zip([0, *counts], counts))
    return list(counts) if rises else []


def _require_memory(entries: int) -> None:
    """Raise `UserError` where so many documents and samples cannot be shuffled at once in the memory of this machine."""
    needed, has = 4 * entries, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > has:
        raise UserError(
            f'data.order = "neox" shuffles all epochs of a run together: {entries:,} documents and samples take '
            f"{needed / 2**30:,.0f} GiB or more, and this machine has {has / 2**30:,.0f} GiB; lower training.steps, or take "
            'data.order = "epoch". Where a checkpoint\'s metadata.json asks for that many, do not go on from it.'
        )


def draw_at_once(_facts: Facts, draw: Draw) -> Arrays:
    """Keeps nothing."""
    return draw()


class NeoxOrder(Order):
    """GPT-NeoX's order; `num_samples` is what the run needs and decides the number of epochs.

    Packed samples are shuffled after the documents; the other packings draw the order of the samples first, then
    shuffle the documents once an epoch ("pack_until_overflow") or leave them in the order of the file ("unpacked").
    There a row ends with its last document, where GPT-NeoX lets the first token of the next one in.

    Args:
        keep: where long orders of packed samples are kept, for shuffling 1e8 numbers takes many seconds.
        begun: fingerprint of the order that the run has been reading, which goes on as far as it reaches. Beyond it further
            samples follow, see [Note: legs].
    """

    def __init__(
        self, corpus: Corpus, num_samples: int, seed: int, keep: Keep = draw_at_once, begun: Facts | None = None
    ) -> None:
        self.packing = corpus.packing
        begun = begun if begun and begun.get("order") == "neox" else {}
        if corpus.packing == "packed":
            self.legs = _counts(begun.get("epochs"))
            self._lay_out_packed(corpus, num_samples, seed, keep)
            return
        self.legs = _counts(begun.get("samples"))
        if not self.legs or self.legs[-1] < num_samples:
            self.legs.append(num_samples)
        _require_memory(self.legs[-1])
        rng = np.random.RandomState(seed)
        self.shuffle = shuffled_samples(self.legs[0], rng)
        for first, stop in zip(self.legs, self.legs[1:]):
            further = first + shuffled_samples(stop - first, np.random.RandomState([seed, first])).astype(np.int64)
            self.shuffle = np.concatenate([self.shuffle, further])
        self._lay_out_whole_documents(corpus, rng)
        self.parts, self.num_samples = [(self.stream, self.shuffle)], len(self.shuffle)

    def _lay_out_packed(self, corpus: Corpus, num_samples: int, seed: int, keep: Keep) -> None:
        """Draws each leg, and one more where they hold too few samples."""
        tokens, length = corpus.num_tokens, corpus.seq_length
        held = sum(((stop - first) * tokens - 1) // length for first, stop in zip([0, *self.legs], self.legs))
        if not self.legs or held < num_samples:
            self.legs.append(sum(self.legs[-1:]) + epochs_needed(tokens, length, num_samples - held))
        _require_memory(self.legs[-1] * (len(corpus.documents) + tokens // length))
        self.parts = [_packed_leg(corpus, first, stop, seed, keep) for first, stop in zip([0, *self.legs], self.legs)]
        self.stream, self.shuffle = self.parts[0]
        self.num_samples = sum(len(shuffle) for _, shuffle in self.parts)

    def _lay_out_whole_documents(self, corpus: Corpus, rng: np.random.RandomState) -> None:
        epoch, parts = _numbers(corpus.documents), []
        samples, missing = 0, 1
        while missing > 0:
            for _ in range(missing):
                if corpus.packing == "pack_until_overflow":
                    rng.shuffle(epoch)
                parts.append(epoch.copy())
            self.stream = corpus.stream(np.concatenate(parts))
            samples = self.stream.num_samples - 1
            missing = -(-(len(self.shuffle) - samples) * len(parts) // max(1, samples))

    def segments(self, sample: int) -> list[Segment]:
        for stream, shuffle in self.parts:
            if sample < len(shuffle):
                return stream.segments(int(shuffle[sample]))
            sample -= len(shuffle)
        raise IndexError(sample)

    def samples_of(self, document: int, stop: int) -> np.ndarray:
        found, first = [], 0
        for stream, shuffle in self.parts:
            found.append(first + np.flatnonzero(np.isin(shuffle[: max(0, stop - first)], stream.samples_of(document))))
            first += len(shuffle)
        return np.concatenate(found)

    def fingerprint(self) -> dict[str, object]:
        counted = "epochs" if self.packing == "packed" else "samples"
        return {"order": "neox", counted: self.legs if len(self.legs) > 1 else self.legs[0]}


def _packed_leg(corpus: Corpus, first: int, stop: int, seed: int, keep: Keep) -> tuple[PackedStream, np.ndarray]:
    """The stream of epochs [first, stop) and the order of its samples; from epoch 0 on it is GPT-NeoX's."""
    num_samples = ((stop - first) * corpus.num_tokens - 1) // corpus.seq_length

    def draw() -> Arrays:
        rng = np.random.RandomState([seed, first] if first else seed)
        documents = np.tile(_numbers(corpus.documents), stop - first)
        rng.shuffle(documents)
        ends = ends_in_stream(documents, corpus.sizes)
        return {"documents": documents, "ends": ends, "samples": shuffled_samples(num_samples, rng)}

    span = corpus.documents.start, corpus.documents.stop
    facts: Facts = {"seed": seed, "documents": span, "epochs": stop - first, "seq_length": corpus.seq_length}
    is_long = max((stop - first) * len(corpus.documents), num_samples) >= LONG
    arrays = (keep if is_long else draw_at_once)(facts | ({"after_epochs": first} if first else {}), draw)
    return PackedStream(arrays["documents"], arrays["ends"], corpus.seq_length), arrays["samples"]


class EpochOrder(Order):
    """Epoch after epoch without end, each shuffled on its own. An epoch is computed when it is first read.

    Under "pack_until_overflow" epochs differ in length, so that the first read computes every epoch before it too: a
    run that resumes in its hundredth epoch waits for a hundred shuffles.
    """

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self.corpus, self.seed, self.num_samples = corpus, seed, ENDLESS
        self._lock = Lock()
        self._recent: dict[int, tuple[Stream, np.ndarray]] = {}
        self._starts = [0, self._epoch(0)[0].num_samples]
        """First sample of each epoch known so far and of the one behind it; grows only where epochs differ in length."""

    def _epoch(self, number: int) -> tuple[Stream, np.ndarray]:
        """Stream and order of the samples of one epoch; the two computed last are kept."""
        if number not in self._recent:
            documents, num_tokens = _numbers(self.corpus.documents), self.corpus.num_tokens
            key = [self.seed, self.corpus.documents.start, len(documents), num_tokens % 2**32, num_tokens >> 32, number]
            rng = np.random.RandomState(key)
            rng.shuffle(documents)
            stream = self.corpus.stream(documents)
            self._recent[number] = stream, shuffled_samples(stream.num_samples, rng)
            if len(self._recent) > 2:
                del self._recent[next(iter(self._recent))]
        return self._recent[number]

    def _find(self, sample: int) -> tuple[int, int]:
        """Epoch of a sample and the epoch's first sample. Only "pack_until_overflow" has epochs of unequal length."""
        if self.corpus.packing != "pack_until_overflow":
            epoch = sample // self._starts[1]
            return epoch, epoch * self._starts[1]
        while self._starts[-1] <= sample:
            self._starts.append(self._starts[-1] + self._epoch(len(self._starts) - 1)[0].num_samples)
        epoch = bisect_right(self._starts, sample) - 1
        return epoch, self._starts[epoch]

    def segments(self, sample: int) -> list[Segment]:
        """See `Order.segments`; safe to call from several threads."""
        with self._lock:
            epoch, first = self._find(sample)
            stream, shuffle = self._epoch(epoch)
        return stream.segments(int(shuffle[sample - first]))

    def samples_of(self, document: int, stop: int) -> np.ndarray:
        """See `Order.samples_of`; computes every epoch below `stop`."""
        found, first = [np.empty(0, np.int64)], 0
        while first < stop:
            with self._lock:
                epoch, _ = self._find(first)
                stream, shuffle = self._epoch(epoch)
            found.append(first + np.flatnonzero(np.isin(shuffle, stream.samples_of(document))))
            first += len(shuffle)
        samples = np.concatenate(found)
        return samples[samples < stop]

    def fingerprint(self) -> dict[str, object]:
        return {"order": "epoch"}


class StoredOrder(Order):
    """Row i of the file is sample i."""

    def __init__(self, corpus: Corpus) -> None:
        self.documents, self.length, self.num_samples = corpus.documents, corpus.seq_length + 1, len(corpus.documents)

    def segments(self, sample: int) -> list[Segment]:
        return [Segment(self.documents[sample], 0, self.length)]

    def samples_of(self, document: int, stop: int) -> np.ndarray:
        samples = np.array([document - self.documents.start], np.int64)
        return samples[(samples >= 0) & (samples < min(stop, self.num_samples))]

    def fingerprint(self) -> dict[str, object]:
        return {"order": "stored"}


def rows_of_rank(num_rows: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> np.ndarray:
    """Rows of a step's global batch that one data rank reads, int64 [microbatches, micro_batch_size].

    Row b of microbatch g on rank r is g * dp * micro + r * micro + b: the set of a step depends on its size alone.
    """
    assert num_rows % (micro_batch_size * dp_size) == 0, (num_rows, micro_batch_size, dp_size)
    return np.arange(num_rows, dtype=np.int64).reshape(-1, dp_size, micro_batch_size)[:, dp_rank]
