"""Small random token files and a straightforward reading of GPT-NeoX's data format and order, for comparison.

Everything here is written with plain loops over bytes and tokens and shares no code with the package.
"""

from __future__ import annotations

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
