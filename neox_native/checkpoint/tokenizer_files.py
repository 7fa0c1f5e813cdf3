"""The tokenizer as a file: in a checkpoint, and as Hugging Face's libraries know it.

A checkpoint tells the name that `data.tokenizer` had, the hash of the content, and holds the tokenizer.json itself where
there was one, so that it reads and writes text wherever it is copied. Those of earlier versions tell the name alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neox_native.checkpoint import files
from neox_native.config.schema import Model
from neox_native.data.tokenizers import END_OF_DOCUMENT, Tokenizer, load_tokenizer
from neox_native.errors import UserError
from neox_native.plain_files import at_home


TOKENIZER = "tokenizer.json"


def tokenizer_facts(name: str, tokenizer: Tokenizer | None) -> tuple[dict[str, str], dict[str, bytes]]:
    """What a checkpoint's metadata says of the tokenizer that `data.tokenizer` names, and the file it holds of it.

    Args:
        tokenizer: None where it is not known.
    """
    told = {"tokenizer": name} if name else {}
    if tokenizer is None:
        return told, {}
    return told | {"tokenizer_sha256": tokenizer.sha256}, {TOKENIZER: tokenizer.file} if tokenizer.file is not None else {}


def own_tokenizer(checkpoint: Path, metadata: Mapping[str, Any]) -> str:
    """What `data.tokenizer` would say for a verified checkpoint's tokenizer: the file that it holds, else what it names; ""
    where it does neither."""
    held = TOKENIZER in files.read_manifest(checkpoint)
    return str(checkpoint / TOKENIZER) if held else str(metadata.get("tokenizer", ""))


def or_own(name: str, own: str) -> str:
    """What `data.tokenizer` says, or the file that a checkpoint holds of its `own_tokenizer` where the one it names is gone."""
    names_file = name not in ("", "byte") and not name.startswith("tiktoken:")
    return own if names_file and Path(own).name == TOKENIZER and not os.path.exists(os.path.expanduser(name)) else name


def other_tokenizer(metadata: Mapping[str, Any], name: str, tokenizer: Tokenizer | None) -> str:
    """A sentence where a checkpoint was trained with another tokenizer than the run's; "" where it was not, or does not
    tell."""
    trained = metadata.get("tokenizer_sha256")
    if tokenizer is None or trained in (None, tokenizer.sha256):
        return ""
    return (
        f"the checkpoint was trained with the tokenizer {metadata.get('tokenizer')!r} (sha256 {str(trained)[:12]}), data.tokenizer = "
        f"{name!r} is another one (sha256 {tokenizer.sha256[:12]})"
    )


def fitting_tokenizer(name: str, model: Model, setting: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer of that name. Raises `UserError` where it has ids that the model does not."""
    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{setting} = {name!r} has {tokenizer.vocab_size} ids, but the model's vocabulary has model.vocab_size = "
            f"{model.vocab_size}; name the tokenizer that its data was made with."
        )
    return tokenizer


def tokenizer_files(name: str, model: Model) -> tuple[dict[str, bytes], int | None, list[str]]:
    """File name -> content for a Hugging Face folder, the id that ends a document, and what is worth knowing.

    Args:
        name: what `data.tokenizer` says; "" for a tokenizer that is not known.
    """
    if not name:
        return {}, None, ["The tokenizer is not known: the folder gets none."]
    tokenizer = fitting_tokenizer(name, model)
    if name.startswith("tiktoken:"):
        return {}, tokenizer.eod_id, [f"{name} is no tokenizer.json: the folder gets no tokenizer."]
    path = at_home(name)
    path = path / TOKENIZER if path.is_dir() else path
    content = json.dumps(byte_level_json()).encode() if name == "byte" else path.read_bytes()
    eod = tokenizer.decode([tokenizer.eod_id])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eod,
        "eos_token": eod,
        "unk_token": eod,
        "model_max_length": model.seq_length,
        "clean_up_tokenization_spaces": False,
    }
    folder = {TOKENIZER: content, "tokenizer_config.json": json.dumps(settings, indent=1).encode()}
    return folder, tokenizer.eod_id, []


def byte_level_json() -> dict[str, Any]:
    """The "byte" tokenizer as a tokenizer.json: a byte-level BPE without merges, in which id b is byte b."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    # GPT-2's spelling of bytes: printable ones stand for themselves, the others for characters from 256 on.
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256, "content": END_OF_DOCUMENT, **end}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {spelling[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }
