"""What the tools' command lines share: limits of numbers, and mistakes told in one sentence like all others."""

from __future__ import annotations

import argparse
import operator
import re
from collections.abc import Callable
from typing import Any, NoReturn

from neox_native.errors import UserError

LARGEST = 2**63 - 1
"""No number of anything goes further."""


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are `UserError`s, and whose `--help` shows the description as it stands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter} | settings)

    def error(self, message: str) -> NoReturn:
        """Called by argparse, with its own words or those of `whole` and `number`."""
        told = re.sub(r"^argument (\S+): (?=.* must be a)", r"\1 ", message).removeprefix("argument ")
        raise UserError(f"{told[0].upper()}{told[1:]}; {self.prog} --help lists the options.")


def whole(least: int = -LARGEST) -> Callable[[str], int]:
    """An option's type: a whole number that is no smaller."""
    return _limited(int, "a whole number", "of at least", operator.ge, least)


def number(least: float = -LARGEST, most: float = LARGEST) -> Callable[[str], float]:
    """An option's type: a number within limits, both included."""
    return _limited(float, "a number", "of at least", operator.ge, least, most)


def number_above(limit: float, most: float = LARGEST) -> Callable[[str], float]:
    """An option's type: a number above a limit."""
    return _limited(float, "a number", "above", operator.gt, limit, most)


def _limited(
    kind: type, what: str, floor: str, reaches: Callable[[Any, Any], bool], least: float, most: float = LARGEST
) -> Callable[[str], Any]:
    limits = [f"{floor} {least:g}"] * (least > -LARGEST) + [f"at most {most:g}"] * (most < LARGEST)

    def read(text: str) -> Any:
        try:
            value = kind(text)
            if reaches(value, least) and value <= most:  # no infinity does both, and what is no number neither
                return value
        except ValueError:
            pass
        shown = text if re.fullmatch(r"\S{1,40}", text) else f"{text!r:.40}"
        raise argparse.ArgumentTypeError(f"{shown} must be {what} {' and '.join(limits)}".rstrip())

    return read
