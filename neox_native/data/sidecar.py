"""What made a pair of token files: PREFIX.about.json beside PREFIX.idx and PREFIX.bin.

[Note: the sidecar] A JSON object, written and renamed before the .idx, so that a prefix whose .idx exists has it:

    {"format": 1,
     "tokenizer": {"name": "20B_tokenizer-1c4f0a23", "sha256": "...", "vocab_size": 50277, "end_of_document": 0},
     "documents": 1200, "tokens": 345678,
     "made_by": {"program": "neox_native", "version": "0.1.0", "options": {...}}}

`sha256` is that of `Tokenizer.sha256`: equal ones give equal ids, whatever the names. `documents` and `tokens` are the pair's; a
sidecar with other counts lies beside files that replaced its own. `options` are those of the preparation; of joined
files it is {"merged": [what made each]}. Files without a sidecar, as Megatron and GPT-NeoX write them, are read, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neox_native import __version__
from neox_native.data.indexed import SUFFIX, IndexedDataset
from neox_native.data.tokenizers import Tokenizer
from neox_native.errors import UserError
from neox_native.plain_files import read_json

FORMAT = 1
PADDING = 1024
"""Ids by which a model's vocabulary may exceed the tokenizer's without a notice: more is no usual padding."""


class Vocabulary(NamedTuple):
    """What of a tokenizer data depends on."""

    name: str
    sha256: str
    vocab_size: int
    end_of_document: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """That of a tokenizer at hand."""
        return cls(tokenizer.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod_id)

    def __str__(self) -> str:
        return f"{self.name} (sha256 {self.sha256[:12]}, {self.vocab_size:,} ids)"


def about(vocabulary: Vocabulary, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a sidecar says, but for the counts, which the writer of the pair knows."""
    made_by = {"program": "neox_native", "version": __version__, "options": dict(options)}
    return {"format": FORMAT, "tokenizer": vocabulary._asdict(), "made_by": made_by}


def read_sidecar(files: IndexedDataset) -> dict[str, Any] | None:
    """The sidecar of a pair; None where there is none.

    Raises `UserError` where it cannot be read, or is of another pair.
    """
    prefix, documents, tokens = files.prefix, len(files), int(files.sizes.sum(dtype=np.int64))
    path = Path(f"{prefix}{SUFFIX}")
    if not path.exists():
        return None
    content = read_json(path)
    told = content.get("tokenizer")
    kinds = {"name": str, "sha256": str, "vocab_size": int, "end_of_document": int}
    whole = isinstance(told, dict) and told.keys() == kinds.keys() and all(type(told[name]) is kinds[name] for name in kinds)
    if content.get("format") != FORMAT or not whole:
        raise UserError(f"{path} does not say in format {FORMAT} what made {prefix}; remove it, or prepare the text again.")
    if (content.get("documents"), content.get("tokens")) != (documents, tokens):
        raise UserError(
            f"{path} is of {content.get('documents')} documents and {content.get('tokens')} tokens, but {prefix}.idx has "
            f"{documents} and {tokens}: the files were replaced; remove {path.name}."
        )
    return content


def vocabulary_of(sidecar: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer that a sidecar names."""
    return Vocabulary(**sidecar["tokenizer"])


def one_vocabulary(made: Mapping[str, Vocabulary]) -> Vocabulary | None:
    """The tokenizer of all prefixes; None where none is known. Raises `UserError` where two differ."""
    first: tuple[str, Vocabulary] | None = None
    for prefix, vocabulary in made.items():
        first = first or (prefix, vocabulary)
        if vocabulary.sha256 != first[1].sha256:
            raise UserError(
                f"{first[0]} was made with the tokenizer {first[1]} and {prefix} with {vocabulary}; a model reads one: prepare "
                "one of the two again."
            )
    return first[1] if first else None


def merged(prefixes: Sequence[str | Path]) -> dict[str, Any] | None:
    """What the sidecar of files joined from these says; None where one of them has none.

    Raises `UserError` where two were made with different tokenizers.
    """
    told = [(str(prefix), sidecar) for prefix in prefixes if (sidecar := read_sidecar(IndexedDataset(prefix)))]
    vocabulary = one_vocabulary({prefix: vocabulary_of(sidecar) for prefix, sidecar in told})
    if vocabulary is None or len(told) < len(prefixes):
        return None
    return about(vocabulary, {"merged": [sidecar["made_by"] for _, sidecar in told]})


def check_tokenizer(
    made: Mapping[str, Vocabulary],
    tokenizer: Tokenizer | None,
    given: str,
    vocab_size: int,
    notice: Callable[[str], None],
) -> None:
    """Raises `UserError` where data, tokenizer and model do not belong together; gives a notice where they hardly do.

    Args:
        made: by prefix, the tokenizers of the files that tell theirs.
        tokenizer: the one that a setting or option names; None where it names none.
        given: that setting and its value, for sentences.
        vocab_size: of the model.
    """
    known = one_vocabulary(made)
    named = Vocabulary.of(tokenizer) if tokenizer else None
    if known and named and known.sha256 != named.sha256:
        prefix = next(iter(made))
        raise UserError(
            f"{prefix} was made with the tokenizer {known}, but {given} is {named}; name the tokenizer that made the data, or "
            f"prepare the text again. Where you know that the ids mean the same, remove {prefix}{SUFFIX}."
        )
    vocabulary = named or known
    if vocabulary is None:
        return
    whose = given if named else f"the tokenizer {vocabulary} that made the data"
    surplus = vocab_size - vocabulary.vocab_size
    if surplus < 0 and (made or vocabulary.name != "byte"):
        raise UserError(
            f"model.vocab_size = {vocab_size} is below the {vocabulary.vocab_size} ids of {whose}; raise it to "
            f"{vocabulary.vocab_size} or choose another tokenizer."
        )
    if surplus < 0:  # the default, of data that does not tell
        notice(f"model.vocab_size = {vocab_size} is below the {vocabulary.vocab_size} ids of {whose}: did it make the data?")
    if surplus > PADDING:
        notice(
            f"model.vocab_size = {vocab_size:,} is {surplus:,} more than the {vocabulary.vocab_size:,} ids of {whose}: right for "
            "padding, wrong if another tokenizer made the data"
        )
