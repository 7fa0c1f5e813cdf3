"""Tokenizers: exact, and closed to injected special tokens."""

from __future__ import annotations

import pytest

from neox_native.data.tokenizers import END_OF_DOCUMENT, load_tokenizer
from neox_native.errors import UserError

TEXTS = ["", "a", "def f(x):\n\treturn x\n", "ä€😀\u0000\r\n", "x" * 1000, "\n" * 70, END_OF_DOCUMENT]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokens_are_the_bytes(text: str) -> None:
    tokenizer = load_tokenizer("byte")
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_document_injects_the_end_of_document_only_when_allowed() -> None:
    tokenizer = load_tokenizer("byte")
    assert tokenizer.eod_id == 256 and tokenizer.vocab_size == 257
    assert tokenizer.eod_id not in tokenizer.encode(f"a{END_OF_DOCUMENT}b")
    assert tokenizer.encode(f"a{END_OF_DOCUMENT}b", allow_special=True).tolist() == [97, 256, 98]


def test_a_batch_is_its_texts_end_to_end() -> None:
    tokenizer = load_tokenizer("byte")
    ids, lengths = tokenizer.encode_batch(TEXTS)
    assert bytes(ids.astype("u1")) == "".join(TEXTS).encode() and lengths.tolist() == [
        len(text.encode()) for text in TEXTS
    ]
    assert [len(part) for part in tokenizer.encode_batch([])] == [0, 0]


def test_an_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="data.tokenizer = 'klingon' is not known"):
        load_tokenizer("klingon")
