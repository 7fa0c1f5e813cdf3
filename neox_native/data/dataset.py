"""A token file read in an order: sample number i -> S + 1 tokens."""

from __future__ import annotations

import hashlib
from typing import NamedTuple, Protocol

import numpy as np

from neox_native.data.indexed import IndexedDataset
from neox_native.data.order import NeoxOrder, Segment
from neox_native.errors import UserError


class Place(NamedTuple):
    """Where a sample's tokens lie: the prefix of the token file and the segments in it."""

    dataset: str
    segments: list[Segment]


class Dataset(Protocol):
    """What the loader and the inspection tools read."""

    seq_length: int
    """S: a sample has S + 1 tokens."""
    vocab_size: int
    """Token ids must be below it; the loader checks every batch."""
    num_samples: int
    """Samples that the order offers, at least as many as the run needs."""

    def sample(self, index: int) -> np.ndarray:
        """The S + 1 tokens of sample `index`, in the file's integer type."""

    def locate(self, index: int) -> Place:
        """Where those tokens lie."""

    def fingerprint(self) -> dict[str, object]:
        """Everything that defines the order, by name."""

    def describe(self) -> str:
        """A sentence for the log."""


class TokenDataset:
    """The documents of one split of one token file, in an order.

    `num_samples` is what the run needs. Raises `UserError` where the split is shorter than one sample.
    """

    def __init__(
        self,
        files: IndexedDataset,
        documents: range,
        *,
        name: str,
        seq_length: int,
        vocab_size: int,
        num_samples: int,
        seed: int,
        order: str,
    ) -> None:
        self.files, self.documents, self.name, self.order_name = files, documents, name, order
        self.seq_length, self.vocab_size, self.seed = seq_length, vocab_size, seed
        self.num_tokens = int(files.sizes[self.documents.start : self.documents.stop].sum(dtype=np.int64))
        if self.num_tokens < seq_length + 1:
            raise UserError(
                f"data: the {name} documents of {files.prefix} hold {self.num_tokens:,} tokens, one sample takes "
                f"model.seq_length + 1 = {seq_length + 1:,}; give more text, another data.split, or a shorter sequence."
            )
        self.order = NeoxOrder(self.documents, files.sizes, seq_length, num_samples, seed)
        self.num_samples = self.order.num_samples

    def locate(self, index: int) -> Place:
        """See `Dataset.locate`."""
        return Place(self.files.prefix, self.order.segments(index))

    def sample(self, index: int) -> np.ndarray:
        """See `Dataset.sample`."""
        parts = [self.files.get(*segment) for segment in self.order.segments(index)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def fingerprint(self) -> dict[str, object]:
        """See `Dataset.fingerprint`; reads the whole .idx to hash it."""
        with self.files.idx_path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "idx_sha256": digest,
            "bin_bytes": self.files.num_bytes,
            "documents": [self.documents.start, self.documents.stop],
            "seq_length": self.seq_length,
            "seed": self.seed,
            "order": self.order_name,
            "epochs": self.order.epochs,
        }

    def describe(self) -> str:
        """See `Dataset.describe`."""
        return (
            f"{self.name}: {len(self.documents):,} documents, {self.num_tokens:,} tokens of {self.files.prefix}, "
            f"{self.num_samples:,} samples in {self.order.epochs} epoch{'s' if self.order.epochs > 1 else ''}, order "
            f"{self.order_name}"
        )


def check_fingerprint(saved: dict[str, object], current: dict[str, object], what: str) -> None:
    """Raises `UserError` that names every entry in which the data of a checkpoint and of this run differ."""
    names = sorted(saved.keys() | current.keys())
    changed = [
        f"{name} was {saved.get(name)!r}, is {current.get(name)!r}"
        for name in names
        if saved.get(name) != current.get(name)
    ]
    if changed:
        raise UserError(
            f"the {what} data is not in the order that the checkpoint was reading: {'; '.join(changed)}. Continue "
            "with the data "
            'settings of the checkpoint, or start anew with checkpoint.resume = "none" in another run.dir.'
        )
