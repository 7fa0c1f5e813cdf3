"""Perplexity of documents: per token, and per byte and word of their text where a tokenizer can tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from neox_native.data.tokenizers import Tokenizer
from neox_native.errors import UserError
from neox_native.inference.score import Scorer, Window, windows

AT_ONCE = 1024
"""Windows sorted by length together; bounds memory."""


@dataclass
class Perplexity:
    """Sums over documents."""

    nats: float = 0.0
    """Negative log-likelihood of the predicted tokens [nats]."""
    tokens: int = 0
    """Predicted tokens."""
    text_bytes: int = 0
    """UTF-8 bytes of the predicted text; 0 where no tokenizer told."""
    words: int = 0
    """White-space separated words of it."""

    def report(self) -> dict[str, float | int]:
        """What is printed: `loss` [nats per token], `tokens`, and what follows from them."""
        if not self.tokens:
            raise UserError("There is nothing to predict: every document has fewer than two tokens.")
        found: dict[str, float | int] = {"loss": self.nats / self.tokens, "tokens": self.tokens}
        found["token_perplexity"] = math.exp(self.nats / self.tokens)
        if self.text_bytes:
            found |= {"bytes": self.text_bytes, "words": self.words}
            found["bits_per_byte"] = self.nats / self.text_bytes / math.log(2)
            found["byte_perplexity"] = math.exp(self.nats / self.text_bytes)
        if self.words:
            per_word = self.nats / self.words
            found["word_perplexity"] = math.exp(per_word) if per_word < 700 else math.inf
        return found


def measure(scorer: Scorer, documents: Iterable[np.ndarray], stride: int, tokenizer: Tokenizer | None) -> Perplexity:
    """Score every document's windows, see [Note: windows] of `score.py`.

    Args:
        stride: tokens that a window predicts; the model's context for no overlap [tokens].
        tokenizer: reads bytes and words off the predicted tokens; the ends of documents are no text.
    """
    if not 1 <= stride <= scorer.context:
        raise UserError(f"stride = {stride} must lie between 1 and the model's context, model.seq_length = {scorer.context}.")
    total = Perplexity()

    def all_windows() -> Iterator[Window]:
        for document in documents:
            if tokenizer is not None and len(document) > 1:
                predicted = document[1:]
                text = tokenizer.decode(predicted[predicted != tokenizer.eod_id])
                total.text_bytes += len(text.encode())
                total.words += len(text.split())
            yield from windows(document, scorer.context, stride)

    source = all_windows()
    while chunk := list(islice(source, AT_ONCE)):
        total.nats -= sum(score.logprob for score in scorer(chunk))
        total.tokens += sum(window.predicted for window in chunk)
    return total
