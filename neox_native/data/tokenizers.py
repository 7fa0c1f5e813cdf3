"""Text to token ids and back, on tiktoken.

`load_tokenizer("byte")` needs no file and no network: token b is byte b, and one id more ends a document.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import tiktoken

from neox_native.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What preparation, generation and inspection need of a tokenizer."""

    name: str
    """Names the vocabulary in file names: equal names mean equal ids."""
    vocab_size: int
    """Ids are 0 .. vocab_size - 1."""
    eod_id: int
    """The id that ends a document."""

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """Ids of a text, u32 [n]. A text that spells a special token yields its id only if `allow_special`."""

    def encode_batch(self, texts: list[str], allow_special: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts end to end, u32 [sum of n], and the length of each, i64 [texts]."""

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD."""


class TiktokenTokenizer:
    """A tiktoken encoding behind the `Tokenizer` interface."""

    def __init__(self, name: str, encoding: tiktoken.Encoding, eod_id: int) -> None:
        self.name, self.encoding, self.eod_id = name, encoding, eod_id
        self.vocab_size = encoding.n_vocab

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """See `Tokenizer.encode`."""
        allowed = self.encoding.special_tokens_set if allow_special else set()
        return self.encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())

    def encode_batch(self, texts: list[str], allow_special: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer.encode_batch`."""
        parts = [self.encode(text, allow_special) for text in texts]
        lengths = np.array([len(part) for part in parts], np.int64)
        return np.concatenate(parts) if parts else np.empty(0, np.uint32), lengths

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """See `Tokenizer.decode`."""
        return self.encoding.decode([int(token) for token in ids])


def byte_tokenizer() -> TiktokenTokenizer:
    """257 ids: the 256 bytes and the end of a document. The pattern only bounds the pieces; nothing is ever
    merged."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding(
        "byte", pat_str=r"[\s\S]{1,64}", mergeable_ranks=ranks, special_tokens={END_OF_DOCUMENT: 256}
    )
    return TiktokenTokenizer("byte", encoding, eod_id=256)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names. Raises `UserError` for a name that is none."""
    if name == "byte":
        return byte_tokenizer()
    raise UserError(f'data.tokenizer = {name!r} is not known; it can be "byte".')
