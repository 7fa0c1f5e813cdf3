"""Small random token files and a straightforward reading of GPT-NeoX's data format and order, for comparison.

Everything here is written with plain loops over bytes and tokens and shares no code with the package.
"""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path

import numpy as np

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def random_documents(seed: int, count: int, longest: int = 40, vocab_size: int = 300) -> list[list[int]]:
    """Documents of 0 to `longest` tokens."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(draw.randrange(longest + 1))] for _ in range(count)]


def file_bytes(documents: list[list[int]], dtype: str = "uint16") -> tuple[bytes, bytes]:
    """What PREFIX.idx and PREFIX.bin must hold, field by field."""
    form = {"uint8": "<B", "int8": "<b", "int16": "<h", "int32": "<i", "int64": "<q", "uint16": "<H"}[dtype]
    idx = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype])
    idx += struct.pack("<Q", len(documents)) + struct.pack("<Q", len(documents) + 1)
    idx += b"".join(struct.pack("<i", len(document)) for document in documents)
    position, pointers = 0, b""
    for document in documents:
        pointers += struct.pack("<q", position)
        position += len(document) * struct.calcsize(form)
    idx += pointers + b"".join(struct.pack("<q", start) for start in range(len(documents) + 1))
    return idx, b"".join(struct.pack(form, token) for document in documents for token in document)


def write_files(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> str:
    """Writes both files and returns the prefix."""
    idx, tokens = file_bytes(documents, dtype)
    Path(f"{prefix}.idx").write_bytes(idx)
    Path(f"{prefix}.bin").write_bytes(tokens)
    return str(prefix)


def neox_samples(
    documents: list[list[int]], first: int, stop: int, seq_length: int, needed: int, seed: int
) -> list[list[int]]:
    """All samples of the order "neox" for documents [first, stop), in the order in which a run reads them."""
    tokens_per_epoch = sum(len(documents[number]) for number in range(first, stop))
    epochs = 0
    while True:
        epochs += 1
        if (epochs * tokens_per_epoch - 1) // seq_length >= needed:
            break
    rng = np.random.RandomState(seed)
    document_order = np.array([number for _ in range(epochs) for number in range(first, stop)], dtype=np.int32)
    rng.shuffle(document_order)
    stream = [token for number in document_order for token in documents[number]]
    count = (epochs * tokens_per_epoch - 1) // seq_length
    packed = [stream[sample * seq_length : sample * seq_length + seq_length + 1] for sample in range(count)]
    shuffle = np.arange(count, dtype=np.uint32)
    rng.shuffle(shuffle)
    return [packed[sample] for sample in shuffle]


def whole_document_samples(
    documents: list[list[int]],
    usable: list[int],
    packing: str,
    seq_length: int,
    needed: int,
    seed: int,
    first: int,
    stop: int,
) -> list[list[int]]:
    """The samples of the order "neox" for the packings that never cut between two samples, unpadded."""
    rng = np.random.RandomState(seed)
    shuffle = np.arange(needed)
    rng.shuffle(shuffle)
    numbers = np.arange(first, stop)
    samples: list[list[int]] = []
    while len(samples) <= needed:
        if packing == "pack_until_overflow":
            rng.shuffle(numbers)
        for number in numbers:
            if number not in usable:
                continue
            document = documents[number]
            if packing == "pack_until_overflow" and samples and len(samples[-1]) + len(document) <= seq_length + 1:
                samples[-1] += document
            else:
                samples.append(list(document))
    return [samples[sample][: seq_length + 1] for sample in shuffle]


def blend(weights: list[float], count: int) -> list[tuple[int, int]]:
    """For each sample of a blended stream the dataset and its sample, one comparison at a time."""
    shares = [weight / sum(weights) for weight in weights]
    total = float(np.sum(np.array(shares)))
    shares = [share / total for share in shares]
    given = [0] * len(weights)
    found = []
    for sample in range(count):
        best, most = 0, -math.inf
        for number, share in enumerate(shares):
            lag = share * float(max(sample, 1)) - given[number]
            if lag > most:
                best, most = number, lag
        found.append((best, given[best]))
        given[best] += 1
    return found
