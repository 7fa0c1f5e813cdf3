"""Token files read in an order: sample number i -> S + 1 tokens, one file or a weighted mixture of many."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from neox_native.data.blend import Blend
from neox_native.data.indexed import IGNORED, IndexedDataset
from neox_native.data.kept import kept
from neox_native.data.order import ENDLESS, Arrays, Corpus, Draw, EpochOrder, Facts, NeoxOrder, Order, StoredOrder
from neox_native.data.packing import Packing, Segment
from neox_native.errors import UserError


class Place(NamedTuple):
    """Where a sample's tokens lie: the prefix of the token file and the segments in it."""

    dataset: str
    segments: list[Segment]


class Row(NamedTuple):
    """A sample as the model reads it."""

    tokens: np.ndarray
    """[S + 1]; what the segments do not fill is padded with 0."""
    labels: np.ndarray | None
    """[S + 1], negative where the token is no target; None where every token is one."""
    lengths: list[int]
    """Tokens of each segment, in reading order."""


class Reading(NamedTuple):
    """How every file of a part is read."""

    part: str
    """"train" or "valid"."""
    seq_length: int
    """S: a sample has S + 1 tokens."""
    vocab_size: int
    """Token ids must be below it; the loader checks every batch."""
    seed: int
    order: str
    packing: Packing
    document_attention: bool = False
    """Whether batches say which document each token belongs to."""
    document_positions: bool = False
    """Whether batches count positions from the start of each document."""
    kept_orders: str = ""
    """Folder that keeps long orders; empty keeps none."""


class Dataset(Protocol):
    """What the loader and the inspection tools read."""

    reading: Reading
    """How its files are read."""
    num_samples: int
    """Samples that the order offers, at least as many as the run needs."""
    samples_drawn: int
    """Samples that a longer run would read in the same order."""

    def read(self, index: int) -> Row:
        """Sample `index`."""

    def sample(self, index: int) -> np.ndarray:
        """The S + 1 tokens of sample `index`, in the file's integer type."""
        return self.read(index).tokens

    def locate(self, index: int) -> Place:
        """Where those tokens lie."""

    def documents(self) -> dict[str, range]:
        """The documents that are read, by the prefix of their file."""

    def samples_of(self, prefix: str, document: int, stop: int) -> np.ndarray:
        """Which of the samples below `stop` hold a token of a document of a file, ascending, int64."""

    def fingerprint(self) -> dict[str, object]:
        """Everything that defines the order, by name."""

    def describe(self) -> str:
        """What it is, in words, for the log."""


class TokenDataset(Dataset):
    """Some documents of one token file in an order, with labels if a parallel file of the same sizes holds them.

    `num_samples` is what the run needs; the order "stored" offers the rows that there are, perhaps fewer. `begun` is
    the fingerprint of the order that the run has been reading, which goes on. Raises `UserError` where the documents do not
    make one sample, where stored rows have another length, and where labels and tokens do not fit together.
    """

    def __init__(
        self,
        files: IndexedDataset,
        documents: range,
        reading: Reading,
        num_samples: int,
        labels: IndexedDataset | None = None,
        begun: Facts | None = None,
    ) -> None:
        self.files, self.labels, self.reading, self.begun = files, labels, reading, begun
        self.seq_length = reading.seq_length
        if labels is not None and not np.array_equal(labels.sizes, files.sizes):
            raise UserError(
                f"data: the labels {labels.prefix} and the tokens {files.prefix} differ in the sizes of their documents; "
                "prepare them together with tools/prepare_data.py."
            )
        usable = None if reading.packing == "packed" else self._usable(documents)
        self.corpus = Corpus(documents, files.sizes, reading.seq_length, reading.packing, usable)
        self._check_length()
        self.order = self._arrange(num_samples)
        self.num_samples = self.samples_drawn = self.order.num_samples

    def _usable(self, documents: range) -> np.ndarray:
        """Documents that are not empty and have a target; GPT-NeoX too leaves out those whose labels are all masked."""
        usable = self.files.sizes > (1 if self.reading.packing == "unpacked" else 0)
        if self.labels is not None:
            for document in documents:
                labels = self.labels.get(document, 0, min(self.seq_length + 1, int(self.files.sizes[document])))
                usable[document] &= bool((labels >= 0).any())
        return usable

    def _check_length(self) -> None:
        corpus, reading = self.corpus, self.reading
        if reading.packing == "packed" and corpus.num_tokens < corpus.seq_length + 1:
            raise UserError(
                f"data: the {reading.part} documents of {self.files.prefix} hold {corpus.num_tokens:,} tokens, one "
                f"sample takes model.seq_length + 1 = {corpus.seq_length + 1:,}; give more text, another data.split, or "
                "a shorter sequence."
            )
        if corpus.usable is not None and not corpus.usable[corpus.documents.start : corpus.documents.stop].any():
            raise UserError(
                f"data: none of the {len(corpus.documents):,} {reading.part} documents of {self.files.prefix} has a "
                f"token to predict under data.packing = {reading.packing!r}; give more text or another data.split."
            )

    def _arrange(self, num_samples: int) -> Order:
        if self.reading.order == "neox":
            return NeoxOrder(self.corpus, num_samples, self.reading.seed, self._keep, self.begun)
        if self.reading.order == "epoch":
            return EpochOrder(self.corpus, self.reading.seed)
        sizes = self.files.sizes[self.corpus.documents.start : self.corpus.documents.stop]
        odd = np.flatnonzero(sizes != self.seq_length + 1)
        if len(odd) or self.reading.packing != "packed":
            found = f"row {odd[0]} has {sizes[odd[0]]}" if len(odd) else f"data.packing is {self.reading.packing!r}"
            raise UserError(
                f'data.order = "stored" reads rows of model.seq_length + 1 = {self.seq_length + 1} tokens as they lie '
                f'in {self.files.prefix}, with data.packing = "packed", but {found}; set the two to match the file.'
            )
        return StoredOrder(self.corpus)

    def _keep(self, facts: Facts, draw: Draw) -> Arrays:
        if not self.reading.kept_orders:
            return draw()
        return kept(Path(self.reading.kept_orders), facts | {"idx_sha256": _sha256(self.files.idx_path)}, draw)

    def read(self, index: int) -> Row:
        segments = self.order.segments(index)
        tokens = self._gather(self.files, segments, 0)
        lengths = [segment.length for segment in segments]
        if self.labels is not None:
            return Row(tokens, self._gather(self.labels, segments, IGNORED), lengths)
        if self.corpus.packing == "packed":
            return Row(tokens, None, lengths)
        labels = tokens.astype(np.int64)
        labels[sum(lengths) :] = IGNORED
        return Row(tokens, labels, lengths)

    def _gather(self, files: IndexedDataset, segments: list[Segment], padding: int) -> np.ndarray:
        parts = [files.get(*segment) for segment in segments]
        missing = self.seq_length + 1 - sum(len(part) for part in parts)
        if missing and self.corpus.packing == "packed":
            raise UserError(f"data: {files.prefix} ends {missing:,} tokens before a row of it does; prepare it again.")
        if missing:
            parts.append(np.full(missing, padding, files.dtype))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def locate(self, index: int) -> Place:
        return Place(self.files.prefix, self.order.segments(index))

    def documents(self) -> dict[str, range]:
        return {self.files.prefix: self.corpus.documents}

    def samples_of(self, prefix: str, document: int, stop: int) -> np.ndarray:
        return self.order.samples_of(document, stop) if prefix == self.files.prefix else np.empty(0, np.int64)

    def fingerprint(self) -> dict[str, object]:
        """See `Dataset.fingerprint`; reads the whole .idx to hash it."""
        entries: dict[str, object] = {
            "idx_sha256": _sha256(self.files.idx_path),
            "bin_bytes": self.files.num_bytes,
            "documents": [self.corpus.documents.start, self.corpus.documents.stop],
            "seq_length": self.seq_length,
            "seed": self.reading.seed,
            "packing": self.corpus.packing,
            **self.order.fingerprint(),
        }
        if self.labels is not None and self.corpus.usable is not None:
            entries["usable_sha256"] = hashlib.sha256(self.corpus.usable.tobytes()).hexdigest()
        return entries

    def describe(self) -> str:
        order = ", ".join(f"{name} {value}" for name, value in self.order.fingerprint().items())
        offered = "endless" if self.num_samples == ENDLESS else f"{self.num_samples:,}"
        return (
            f"{self.reading.part}: {len(self.corpus.documents):,} documents, {self.corpus.num_tokens:,} tokens of "
            f"{self.files.prefix}, {offered} samples ({order}, {self.corpus.packing})"
        )


class Mixture(Dataset):
    """Several datasets blended by weight, as GPT-NeoX blends them; see `Blend`.

    `make(number, num_samples)` builds dataset `number` so that it offers at least `num_samples` samples. Raises
    `UserError` where stored rows are fewer than the run reads of them.
    """

    def __init__(self, make: Callable[[int, int], TokenDataset], weights: list[float], num_samples: int) -> None:
        self.blend, self.num_samples = Blend(weights, num_samples), num_samples
        shares = [weight / sum(weights) for weight in weights]
        wanted = [max(math.ceil(num_samples * share * 1.005), int(count)) for share, count in zip(shares, self.blend.counts())]
        self.datasets = [make(number, count) for number, count in enumerate(wanted)]
        self.reading = self.datasets[0].reading
        for dataset, count in zip(self.datasets, self.blend.counts()):
            if dataset.num_samples < count:
                raise UserError(
                    f"data: the {self.reading.part} part of {dataset.files.prefix} has {dataset.num_samples:,} "
                    f"samples, the mixture needs {count:,} of them; lower its weight, training.steps or "
                    "training.global_batch_size, or give more rows."
                )
        # A longer mixture would take its share of each dataset with the same margin, and one sample.
        reaches = [int((dataset.num_samples - 1) / (1.005 * share)) for dataset, share in zip(self.datasets, shares)]
        self.samples_drawn = max(num_samples, min(reaches))

    def read(self, index: int) -> Row:
        number, sample = self.blend.locate(index)
        return self.datasets[number].read(sample)

    def locate(self, index: int) -> Place:
        number, sample = self.blend.locate(index)
        return self.datasets[number].locate(sample)

    def documents(self) -> dict[str, range]:
        return {prefix: documents for dataset in self.datasets for prefix, documents in dataset.documents().items()}

    def samples_of(self, prefix: str, document: int, stop: int) -> np.ndarray:
        found = []
        for number, (dataset, count) in enumerate(zip(self.datasets, self.blend.counts())):
            found += [self.blend.stream_sample(number, int(own)) for own in dataset.samples_of(prefix, document, int(count))]
        samples = np.array(sorted(found), np.int64)
        return samples[samples < stop]

    def fingerprint(self) -> dict[str, object]:
        entries: dict[str, object] = {"weights": self.blend.weights.tolist()}
        for number, dataset in enumerate(self.datasets):
            entries.update({f"{number}.{name}": value for name, value in dataset.fingerprint().items()})
        return entries

    def describe(self) -> str:
        lines = [f"{self.reading.part}: a mixture of {len(self.datasets)} datasets, {self.num_samples:,} samples"]
        for dataset, weight, count in zip(self.datasets, self.blend.weights, self.blend.counts()):
            lines.append(f"  {100 * weight:.2f}% {count:,} samples of {dataset.describe()}")
        return "\n".join(lines)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_fingerprint(saved: dict[str, object], current: dict[str, object], what: str) -> None:
    """Raises `UserError` that names every entry in which the data of a checkpoint and of this run differ.

    "samples" and "epochs" may have grown: the order goes on behind those that the checkpoint knew, see [Note: legs].
    """

    def goes_on(name: str) -> bool:
        before, now = saved.get(name), current.get(name)
        if name.split(".")[-1] in ("samples", "epochs") and isinstance(now, list):
            before = before if isinstance(before, list) else [before]
            return now[: len(before)] == before
        return before == now

    names = sorted(saved.keys() | current.keys())
    changed = [f"{name} was {saved.get(name)!r}, is {current.get(name)!r}" for name in names if not goes_on(name)]
    if changed:
        raise UserError(
            f"the {what} data is not in the order that the checkpoint was reading: {'; '.join(changed)}. Continue with "
            'the data settings of the checkpoint, or start anew with checkpoint.resume = "none" in another run.dir.'
        )
