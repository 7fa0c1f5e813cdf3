"""Text to token ids and back, on tiktoken.

`load_tokenizer` knows three kinds: "byte" (no file, no network: token b is byte b, and one id more ends a document),
the path of a Hugging Face `tokenizer.json` with a byte-level BPE, and "tiktoken:NAME" for tiktoken's own encodings.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Protocol

import numpy as np
import tiktoken

from neox_native.data.bpe_file import BpeFile, nfc, read_bpe_file
from neox_native.errors import UserError
from neox_native.plain_files import at_home, read_bytes

END_OF_DOCUMENT = "<|endoftext|>"
MOST_BYTES_OF_A_FILE = 1 << 28
"""Limit of a tokenizer.json; the largest in use have some 30 MB."""


class OutOfReach(UserError):
    """A tokenizer that there is, but that this machine cannot fetch."""


class Tokenizer(Protocol):
    """What preparation, generation and inspection need of a tokenizer."""

    name: str
    """Names the vocabulary in file names: equal names mean equal ids."""
    vocab_size: int
    """Ids are 0 .. vocab_size - 1."""
    eod_id: int
    """The id that ends a document."""
    sha256: str
    """Hash of what decides the ids, hexadecimal: equal hashes mean equal ids, however a tokenizer.json is spelt."""
    file: bytes | None
    """The content of its tokenizer.json; None where it is built in or tiktoken's."""

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """Ids of a text, u32 [n]. A text that spells a special token yields its id only if `allow_special`."""

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD."""


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding behind the `Tokenizer` interface. Its name fixes its ids for ever, so its hash is the name's."""

    file = None

    def __init__(self, name: str, encoding: tiktoken.Encoding, eod_id: int) -> None:
        self.name, self.encoding, self.eod_id = name, encoding, eod_id
        self.sha256 = hashlib.sha256(name.encode()).hexdigest()
        self.vocab_size = encoding.n_vocab

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        allowed = self.encoding.special_tokens_set if allow_special else set()
        return self.encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())

    def decode(self, ids: np.ndarray | list[int]) -> str:
        return self.encoding.decode([int(token) for token in ids])


class FileTokenizer(Tokenizer):
    """A Hugging Face byte-level BPE, its ids equal to the original's without the tokens that a template adds around a text.

    tiktoken merges by rank, which is the index of the merge; a table turns ranks into ids and another ids into bytes.
    """

    def __init__(self, name: str, file: BpeFile, sha256: str, raw: bytes) -> None:
        self.name, self.vocab_size, self._normalise = name, len(file.bytes_of_id), nfc if file.has_nfc else str
        self.sha256, self.file = sha256, raw
        eod = [file.special[text] for text in (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>") if text in file.special]
        if not eod:
            raise UserError(f"data.tokenizer: {name} has no special token {END_OF_DOCUMENT!r} (or the like) to end documents.")
        self.eod_id = eod[0]
        self._special = file.special
        by_length = sorted(file.special, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, by_length)) + ")")
        # Without a special token tiktoken would look for the empty one at every character, at half the speed.
        unused = {END_OF_DOCUMENT: len(file.id_of_rank)}
        try:
            self._encoding = tiktoken.Encoding(name, pat_str=file.pattern, mergeable_ranks=file.ranks, special_tokens=unused)
        except ValueError as error:
            raise UserError(
                f"data.tokenizer: the pattern of {name} is no regular expression that can be used ({error}); use another "
                "tokenizer.json."
            ) from error
        self._id_of_rank = np.array(file.id_of_rank, np.uint32)
        self._bytes_of_id = file.bytes_of_id

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """See `Tokenizer.encode`. Like the original, normalises each part between special tokens by itself."""
        if not allow_special:
            return self._encode_plain(text)
        parts = self._special_pattern.split(text)
        return np.concatenate(
            [np.array([self._special[part]], np.uint32) if n % 2 else self._encode_plain(part) for n, part in enumerate(parts)]
        )

    def _encode_plain(self, text: str) -> np.ndarray:
        ranks = self._encoding.encode_to_numpy(self._normalise(text), disallowed_special=())
        return self._id_of_rank[ranks]

    def decode(self, ids: np.ndarray | list[int]) -> str:
        return b"".join(self._bytes_of_id[int(token)] for token in ids).decode("utf-8", errors="replace")


def byte_tokenizer() -> TiktokenTokenizer:
    """257 ids: the 256 bytes and the end of a document. The pattern only bounds the pieces; nothing is ever merged."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = {END_OF_DOCUMENT: 256}
    encoding = tiktoken.Encoding("byte", pat_str=r"[\s\S]{1,64}", mergeable_ranks=ranks, special_tokens=special)
    return TiktokenTokenizer("byte", encoding, eod_id=256)


def _named_encoding(name: str) -> TiktokenTokenizer:
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise UserError(f"data.tokenizer = 'tiktoken:{name}' is not known; tiktoken has {', '.join(known)}.")
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:
        raise OutOfReach(
            f"data.tokenizer = 'tiktoken:{name}' must be downloaded once and this machine cannot reach its server "
            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that a machine with access has filled, or use "
            '"byte" or a tokenizer.json.'
        ) from error
    return TiktokenTokenizer(f"tiktoken-{name}", encoding, encoding.eot_token)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; see the top of this file. Raises `UserError` where there is none."""
    if name == "byte":
        return byte_tokenizer()
    if name.startswith("tiktoken:"):
        return _named_encoding(name.removeprefix("tiktoken:"))
    path = at_home(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f'data.tokenizer = {name!r} is neither "byte" nor "tiktoken:NAME" nor the path of a tokenizer.json that exists.'
        )
    raw = read_bytes(path, limit=MOST_BYTES_OF_A_FILE)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"data.tokenizer = {name!r} is no JSON file: {error}.") from error
    stem = path.parent.name if path.stem == "tokenizer" else path.stem
    file = read_bpe_file(content, name)
    return FileTokenizer(f"{stem}-{hashlib.sha256(raw).hexdigest()[:8]}", file, _hash_of(content), raw)


def _hash_of(content: dict[str, Any]) -> str:
    """sha256 of what in a tokenizer.json decides ids, spelt in one way: programs that write it again change the rest."""
    model, added = content["model"], content.get("added_tokens") or []
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    tokens = sorted((token["content"], token["id"]) for token in added)
    decides = [model["vocab"], merges, tokens, content.get("normalizer"), content.get("pre_tokenizer")]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
