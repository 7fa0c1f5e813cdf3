"""Ranges of numbers, which stand in `schema.py` in the type of a field: `steps: Count`, `norm_eps: Positive`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args


@dataclass(frozen=True)
class Range:
    """The finite numbers that a setting may be; the default is for numbers without a range of their own."""

    words: str = "0 or more and finite"
    holds: Callable[[float], bool] = lambda number: number >= 0
    """What `words` say."""
    largest: int = (1 << 63) - 1
    """Larger whole numbers fit no tensor and no file, or would fill the memory before a mistake is noticed."""

    def broken_by(self, number: float) -> str:
        """What the number must be, in words; "" where it is in range."""
        if not (self.holds(number) and number < math.inf):
            return self.words
        return f"{self.largest:,} or less" if isinstance(number, int) and number > self.largest else ""


def at_least_one(largest: int = Range.largest) -> Range:
    """Whole numbers from 1 to the largest that makes sense."""
    return Range("1 or more", lambda number: number >= 1, largest)


Count = Annotated[int, at_least_one()]
Positive = Annotated[float, Range("above 0 and finite", lambda number: number > 0)]
Share = Annotated[float, Range("between 0 and 1", lambda number: 0 <= number <= 1)]
REST = "1 or more, or -1 for the ranks that pp and tp leave"
CountOrRest = Annotated[int, Range(REST, lambda number: number == -1 or number >= 1)]
BelowOne = Annotated[float, Range("at least 0 and below 1", lambda number: 0 <= number < 1)]


def range_of(annotation: Any) -> Range:
    """The range that an annotation carries, itself or in its parts."""
    if isinstance(annotation, Range):
        return annotation
    return next((found for found in map(range_of, get_args(annotation)) if found != Range()), Range())
