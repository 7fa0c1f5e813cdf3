"""Token after token, on one process or on a mesh.

Shapes: B rows (a row is one sample of one prompt), T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neox_native.data.tokenizers import Tokenizer
from neox_native.errors import UserError
from neox_native.inference.runner import Runner
from neox_native.inference.sampling import Sampling, choose
from neox_native.inference.score import token_logprobs
from neox_native.inference.text import GrowingText
from neox_native.model.cache import Cache
from neox_native.model.initialize import seed_of


@dataclass(frozen=True)
class Limits:
    """When a row ends, and how many there are."""

    max_new_tokens: int = 128
    """Most tokens of an answer [tokens]; the end of the model's context may come first."""
    stops: Sequence[str] = ()
    """Strings that end the answer; they are not part of it."""
    samples: int = 1
    """Answers to each prompt."""
    ignore_end: bool = False
    """Go on after the token that ends a document."""
    logprobs: bool = False
    """Keep each new token's log-probability; costs a pass over the logits."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be 1 or more.")


@dataclass
class Row:
    """One answer in the making, and at last made."""

    prompt: int
    """Index of its prompt."""
    sample: int
    """Which of the prompt's samples it is."""
    tokens: list[int]
    """Prompt and answer; the token that ended it included."""
    prompt_length: int
    growing: GrowingText
    logprobs: list[float] = field(default_factory=list)
    """Natural logarithm of the probability that the model gave to each new token, before temperature and the like;
    empty where nobody asked."""
    finish: str = ""
    """Why it ended: "end" (of the document), "stop" (a stop string), "length" or "context"; "" while it goes on."""

    @property
    def new_tokens(self) -> list[int]:
        """The answer, without the token that ended the document."""
        return self.tokens[self.prompt_length : len(self.tokens) - (self.finish == "end")]

    @property
    def text(self) -> str:
        """The answer's text, without the stop string."""
        return self.growing.text


OnText = Callable[[Row, str], None]
"""Receives pieces of a row's text as soon as they are certain."""


class Generator:
    """Generates answers. On a mesh all ranks call it alike, and all get the same."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer, use_cache: bool = True):
        self.runner, self.tokenizer, self.use_cache = runner, tokenizer, use_cache
        self.model, self.device = runner.model, runner.device
        self.num_ids = min(runner.model.vocab_size, tokenizer.vocab_size)
        """Ids that may be drawn: those that have a text. The rest are padding."""

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt; an empty one starts as a document does, after the end of another.

        Raises `UserError` where it fills the model's context, or is no text: Python marks bytes of a command line that
        are not UTF-8 with lone surrogates.
        """
        if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UserError(f"The prompt {ascii(prompt[:40])} is not valid UTF-8; write it as UTF-8 text.")
        tokens = self.tokenizer.encode(prompt).tolist() or [self.tokenizer.eod_id]
        if len(tokens) >= self.model.seq_length:
            raise UserError(
                f"The prompt {prompt[:40]!r} has {len(tokens)} tokens, which leaves no room in the model's context of "
                f"model.seq_length = {self.model.seq_length}; shorten it."
            )
        return tokens

    def __call__(
        self,
        prompts: Sequence[str],
        sampling: Sampling = Sampling(),
        limits: Limits = Limits(),
        on_text: OnText | None = None,
    ) -> list[Row]:
        """Answers to all prompts as one batch, `limits.samples` of each in a row."""
        return self.continue_tokens([self.encode(prompt) for prompt in prompts], sampling, limits, on_text)

    def continue_tokens(
        self,
        encoded: Sequence[list[int]],
        sampling: Sampling = Sampling(),
        limits: Limits = Limits(),
        on_text: OnText | None = None,
    ) -> list[Row]:
        """The same for prompts of token ids, none of them empty, each shorter than the model's context."""
        rows = [
            Row(number, sample, list(tokens), len(tokens), GrowingText(self.tokenizer, limits.stops))
            for number, tokens in enumerate(encoded)
            for sample in range(limits.samples)
        ]
        generators = [
            torch.Generator().manual_seed(seed_of(sampling.seed, f"prompt {row.prompt} sample {row.sample}")) for row in rows
        ]
        longest = max(row.prompt_length for row in rows) + limits.max_new_tokens
        cache = Cache(min(longest, self.model.seq_length), self.device) if self.use_cache else None
        seen_BV = self._seen(rows) if sampling.repetition_penalty != 1 else None
        logits = self._first_pass(rows, cache)
        while True:
            uniform_B = None
            if sampling.temperature > 0:
                uniform_B = torch.stack([torch.rand((), generator=generator) for generator in generators]).to(self.device)
            tokens_B = self._next(logits, sampling, seen_BV, uniform_B, len(rows))
            logprobs = self._logprobs(logits, tokens_B).tolist() if limits.logprobs else None
            for number, token in enumerate(tokens_B.tolist()):
                if not rows[number].finish:
                    rows[number].logprobs += logprobs[number : number + 1] if logprobs else []
                    self._accept(rows[number], token, limits, on_text)
            if all(row.finish for row in rows):
                return rows
            if seen_BV is not None:
                seen_BV.scatter_(1, tokens_B[:, None], True)
            logits = self._later_pass(rows, cache)

    def _first_pass(self, rows: list[Row], cache: Cache | None) -> Tensor | None:
        """Logits [B, 1, V] after the rows so far, which are padded on the right: see [Note: cache]."""
        lengths = [len(row.tokens) for row in rows]
        padded = [row.tokens + [0] * (max(lengths) - len(row.tokens)) for row in rows]
        if cache is not None:
            cache.place([0] * len(rows), max(lengths))
        readout_B = torch.tensor(lengths, device=self.device) - 1
        return self.runner(torch.tensor(padded, device=self.device), cache, readout_B)

    def _later_pass(self, rows: list[Row], cache: Cache | None) -> Tensor | None:
        """The same with the newest token of each row alone, where a cache holds the others. A row that has ended
        repeats its last token in its last place."""
        if cache is None:
            return self._first_pass(rows, None)
        cache.place([len(row.tokens) - 1 for row in rows], 1)
        return self.runner(torch.tensor([[row.tokens[-1]] for row in rows], device=self.device), cache)

    def _next(
        self, logits: Tensor | None, sampling: Sampling, seen_BV: Tensor | None, uniform_B: Tensor | None, rows: int
    ) -> Tensor:
        """Next token [B] of each row, on every rank."""
        tokens_B = None
        if logits is not None:
            logits_BV = self.runner.whole_vocabulary(logits[:, -1])[:, : self.num_ids]
            tokens_B = choose(logits_BV, sampling, seen_BV, uniform_B)
        return self.runner.tell_everyone(tokens_B, torch.empty(rows, dtype=torch.int64))

    def _logprobs(self, logits: Tensor | None, tokens_B: Tensor) -> Tensor:
        """Log-probability [B] of each row's next token among the whole padded vocabulary, as in training."""
        found_B = None
        if logits is not None:
            logprobs_B1, _ = token_logprobs(logits, tokens_B[:, None], self.runner.tp_group)
            found_B = logprobs_B1.squeeze(1)
        return self.runner.tell_everyone(found_B, torch.empty(len(tokens_B)))

    def _seen(self, rows: list[Row]) -> Tensor:
        seen_BV = torch.zeros(len(rows), self.num_ids, dtype=torch.bool, device=self.device)
        for number, row in enumerate(rows):
            seen_BV[number, torch.tensor(row.tokens, device=self.device)] = True
        return seen_BV

    def _accept(self, row: Row, token: int, limits: Limits, on_text: OnText | None) -> None:
        """Append a token to a row; see whether that ends it."""
        row.tokens.append(token)
        if token == self.tokenizer.eod_id and not limits.ignore_end:
            row.finish = "end"
        elif len(row.tokens) - row.prompt_length == limits.max_new_tokens:
            row.finish = "length"
        elif len(row.tokens) > self.model.seq_length - 1:
            row.finish = "context"
        if limits.stops or on_text or row.finish:
            row.growing.update(row.new_tokens)
            if row.growing.stopped:
                row.finish = "stop"
        if on_text and (piece := row.growing.news(finished=bool(row.finish))):
            on_text(row, piece)
