"""Which token comes next. Pure arithmetic on logits.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neox_native.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The default takes the most probable one."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most probable token (greedy)."""
    top_k: int = 0
    """Draw among the so many most probable tokens only; 0 among all."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together reach this probability (Holtzman et al. 2020)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that have occurred in the row and multiplies negative ones (Keskar et al. 2019
    §4.1); 1 does nothing."""
    seed: int = 1234
    """Seed of the draws; each row draws from a stream of its own, whatever else is in its batch."""

    def __post_init__(self) -> None:
        limits = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (holds, limit) in limits.items():
            if not holds:
                raise UserError(f"{name} = {getattr(self, name)} must be {limit}.")


def penalise_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Logits of tokens that were seen, moved away from certainty by the factor `penalty`."""
    moved_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, moved_BV, logits_BV)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """-inf for all but the k largest logits of each row (and their equals)."""
    smallest_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """-inf for all but the most probable tokens that together reach probability p; the most probable always stays."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    probabilities_BV = sorted_BV.softmax(dim=-1)
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
    sorted_BV = sorted_BV.masked_fill(before_BV >= p, float("-inf"))
    return torch.full_like(logits_BV, float("-inf")).scatter(-1, order_BV, sorted_BV)


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token id [B] for each row: where `uniform_B`, in [0, 1), falls among the cumulated probabilities."""
    cumulated_BV = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    threshold_B1 = (uniform_B.double() * cumulated_BV[:, -1])[:, None]
    return torch.searchsorted(cumulated_BV, threshold_B1, right=True).squeeze(-1)


def choose(logits_BV: Tensor, settings: Sampling, seen_BV: Tensor | None, uniform_B: Tensor | None) -> Tensor:
    """The next token [B] of each row.

    Args:
        logits_BV: fp32.
        seen_BV: which tokens have occurred in a row; needed for a repetition penalty.
        uniform_B: random numbers in [0, 1); needed above temperature 0.
    """
    if settings.repetition_penalty != 1:
        assert seen_BV is not None
        logits_BV = penalise_repetition(logits_BV, seen_BV, settings.repetition_penalty)
    if settings.temperature == 0:
        return logits_BV.argmax(dim=-1)
    assert uniform_B is not None
    logits_BV = logits_BV / settings.temperature
    if settings.top_k:
        logits_BV = keep_top_k(logits_BV, settings.top_k)
    if settings.top_p < 1:
        logits_BV = keep_top_p(logits_BV, settings.top_p)
    return draw(logits_BV, uniform_B)
