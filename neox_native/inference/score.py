"""How probable the model finds tokens that are given.

Shapes: B windows, T tokens, V vocabulary (this rank's share where it is cut).

[Note: windows] A document of n tokens has n - 1 predictions: every token but the first, from those before it. A window
is a stretch of at most S + 1 tokens, S = the model's context, of which the last ones are predicted. Without overlap a
window's first token is the last one that the window before predicted; with `stride` < S each window but the first
predicts `stride` tokens, each from at least S - stride tokens before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from neox_native.inference.runner import Runner
from neox_native.model.cross_entropy import Holder, softmax
from neox_native.parallel.loss import RanksOfVocabulary


class Window(NamedTuple):
    """Tokens to predict in their context."""

    tokens: np.ndarray | list[int]
    """Context and predicted tokens, at most S + 1."""
    predicted: int
    """How many of the last ones count."""


class Score(NamedTuple):
    """What the model says of a window."""

    logprob: float
    """Sum of the natural logarithms of the predicted tokens' probabilities [nats]."""
    greedy: bool
    """Whether each of them is the most probable one in its place."""


def windows(tokens: np.ndarray | list[int], context: int, stride: int) -> Iterator[Window]:
    """A document's windows, see [Note: windows]; every token but the first is predicted exactly once.

    Args:
        context: S [tokens].
        stride: 1 .. S [tokens].
    """
    predicted = 1
    while predicted < len(tokens):
        end = min(len(tokens), context + 1 if predicted == 1 else predicted + stride)
        yield Window(tokens[max(0, end - context - 1) if stride < context else predicted - 1 : end], end - predicted)
        predicted = end


def token_logprobs(logits_BTV: Tensor, targets_BT: Tensor, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Log-probability of each target (fp32) and whether it is a most probable one, [B, T] each.

    Where the vocabulary is cut, the logits are never gathered.
    """
    holder = Holder() if tp_group is None else RanksOfVocabulary(tp_group, logits_BTV.shape[-1])
    found = softmax(logits_BTV.to(torch.float32, copy=True), targets_BT, holder)
    return found.target - found.total.log(), found.target >= 0


class Scorer:
    """Scores windows in batches. On a mesh all ranks call it alike, and all get the same.

    Args:
        batch_size: windows of one forward pass.
    """

    def __init__(self, runner: Runner, batch_size: int = 8):
        self.runner, self.batch_size = runner, batch_size
        self.context = runner.model.seq_length

    def __call__(self, scored: Sequence[Window]) -> list[Score]:
        """A score for each window. Windows of like length share a batch, the longest first."""
        order = sorted(range(len(scored)), key=lambda index: -len(scored[index].tokens))
        scores: list[Score] = [Score(0.0, True)] * len(scored)
        for first in range(0, len(order), self.batch_size):
            indices = order[first : first + self.batch_size]
            found_2B = self._batch([scored[index] for index in indices])
            for index, logprob, greedy in zip(indices, *found_2B.tolist()):
                scores[index] = Score(logprob, bool(greedy))
        return scores

    def _batch(self, batch: list[Window]) -> Tensor:
        """[2, B]: sums of log-probabilities, and whether all were greedy."""
        length = max(len(window.tokens) for window in batch)
        assert 2 <= length <= self.context + 1, length
        tokens_BT = torch.zeros(len(batch), length, dtype=torch.int64)
        counts_BT = torch.zeros(len(batch), length, dtype=torch.bool)
        for row, window in enumerate(batch):
            size = len(window.tokens)
            tokens_BT[row, :size] = torch.as_tensor(np.asarray(window.tokens, dtype=np.int64))
            counts_BT[row, size - window.predicted : size] = True
        tokens_BT, counts_BT = tokens_BT.to(self.runner.device), counts_BT.to(self.runner.device)[:, 1:]
        logits_BTV = self.runner(tokens_BT[:, :-1])
        found_2B = None
        if logits_BTV is not None:
            sums = []
            for row in range(len(batch)):  # row by row: the fp32 copy of a row's logits is large enough
                one = slice(row, row + 1)
                logprobs, greedy = token_logprobs(logits_BTV[one], tokens_BT[one, 1:], self.runner.tp_group)
                counted = counts_BT[one]
                sums.append(torch.stack((logprobs.double()[counted].sum(), greedy[counted].all().double())))
            found_2B = torch.stack(sums, dim=1)
        return self.runner.tell_everyone(found_2B, torch.empty(2, len(batch), dtype=torch.float64))
