"""Ranges of numbers, which stand in `schema.py` beside the type of a field: `steps: Count`, `norm_eps: Positive`.

A number with no range of its own is zero or more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, get_args

LARGEST_WHOLE_NUMBER = (1 << 63) - 1
"""What the numbers of tensors and files can be."""


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`, and what is said of others."""

    words: str = "0 or more and finite"
    """What a number must be, where one below `low` or above `high` is given."""
    low: float = 0
    high: float = math.inf
    without_low: bool = False
    """Whether `low` itself is out of range."""
    without_high: bool = False
    """Whether `high` itself is out of range."""
    largest: int = LARGEST_WHOLE_NUMBER
    """Whole numbers above this are refused by the number: they would fill the memory before a mistake is noticed."""
    besides: int | None = None
    """One more number that is allowed."""

    def broken_by(self, number: float) -> str:
        """What the number must be, in words; "" where it is in range."""
        above = self.low < number if self.without_low else self.low <= number
        below = number < self.high if self.without_high else number <= self.high
        if number != self.besides and not (above and below and number < math.inf):
            return self.words
        return f"{self.largest:,} or less" if isinstance(number, int) and number > self.largest else ""


def at_least_one(largest: int = LARGEST_WHOLE_NUMBER) -> Range:
    """Whole numbers from 1 to the largest that makes sense."""
    return Range("1 or more", low=1, largest=largest)


Count = Annotated[int, at_least_one()]
Positive = Annotated[float, Range("above 0 and finite", without_low=True)]
Share = Annotated[float, Range("between 0 and 1", high=1)]
BelowOne = Annotated[float, Range("at least 0 and below 1", high=1, without_high=True)]


def range_of(annotation: Any) -> Range:
    """The range that an annotation carries, itself or of a list's numbers."""
    for part in (*getattr(annotation, "__metadata__", ()), *map(range_of, get_args(annotation))):
        if isinstance(part, Range) and part != Range():
            return part
    return Range()
