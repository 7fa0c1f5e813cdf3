"""The data that a run reads. See `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Data:
    """What the model reads, and in which order."""

    train: str | list[dict] = "builtin:python-stdlib"
    """Training data: a prefix of .idx/.bin files, "builtin:python-stdlib", or a list of {path, weight, labels} to blend;
    labels, which may be left out, is the prefix of files with -100 where a token is not to be predicted."""
    valid: str | list[dict] = ""
    """Validation data; empty takes the second part of `split` of the training data."""
    split: str = "969,30,1"
    """Shares of training and validation documents where they come from the same files; nothing reads a third share."""
    tokenizer: str = "byte"
    """Tokenizer that made the data: "byte", a Hugging Face tokenizer.json, or "tiktoken:gpt2" and its like."""
    order: Literal["neox", "epoch", "stored"] = "neox"
    """Order of the samples: "neox" is GPT-NeoX's, to the token, and where a run is made longer than that, further epochs
    follow, drawn anew; "epoch" shuffles each epoch on its own, so that a longer run continues a shorter one; "stored" takes
    rows of seq_length + 1 tokens as they lie (Pythia's preshuffled data)."""
    packing: Literal["packed", "pack_until_overflow", "unpacked"] = "packed"
    """How documents fill a row: end to end, whole documents while they fit, or one document; the last two pad."""
    document_attention: bool = False
    """Tokens attend within their own document only: FlexAttention on a GPU (without dropout and ALiBi), else a mask."""
    document_positions: bool = False
    """Positions restart at 0 with each document."""
    cache_dir: str = "~/.cache/neox_native"
    """Folder of built-in corpora, prepared once per machine, and of orders of 1e7 samples or documents and more (4 bytes
    a sample, 12 a document and epoch), which nothing removes: it may be deleted between runs, and is made again."""
