"""One value of a config: checked against its field's annotation, read from a word of the command line, written as TOML.

The annotations that a field may have: bool, int, float, str, Literal, list[...], dict, and unions of them.
"""

from __future__ import annotations

import datetime
import json
import re
import tomllib
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", dict: "a table"}
PLURALS = {int: "whole numbers", float: "numbers", str: "strings", dict: "tables"}


class Mismatch(Exception):
    """The value is not of the annotation's kind; the caller knows which setting it was meant for."""


def describe(annotation: Any) -> str:
    """The values that annotation allows, in words: "a whole number", "one of "a", "b"", "a list of numbers"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " * (len(arguments) > 1) + ", ".join(json.dumps(choice) for choice in arguments)
    if origin in (Union, UnionType):
        return " or ".join(describe(alternative) for alternative in arguments)
    if origin is list:
        return f"a list of {PLURALS[arguments[0]]}"
    return NAMES[annotation]


def convert(value: Any, annotation: Any) -> Any:
    """Return value as the field wants it: unchanged, except that a whole number becomes a float where a float is due.

    Raises Mismatch where the value is of another kind. A bool is not a number here.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return _first_match(arguments, lambda alternative: convert(value, alternative))
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin is list:
        if isinstance(value, list):
            return [convert(item, arguments[0]) for item in value]
    elif annotation is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError as error:
                raise Mismatch from error
    elif type(value) is annotation:
        return value
    raise Mismatch


def from_text(text: str, annotation: Any) -> Any:
    """Read a word of the command line. Strings stand without quotes; lists and tables are TOML.

    Raises Mismatch where the text is not of the annotation's kind.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):

        def is_container(alternative: Any) -> bool:
            return get_origin(alternative) is list or alternative is dict

        looks_like_container = text.lstrip().startswith(("[", "{"))
        return _first_match(
            [a for a in arguments if is_container(a) == looks_like_container],
            lambda alternative: from_text(text, alternative),
        )
    if origin is Literal or annotation is str:
        return convert(text, annotation)
    try:
        if annotation is bool:
            return {"true": True, "false": False}[text]
        if annotation in (int, float):
            return annotation(text)
        return convert(tomllib.loads(f"value = {text}")["value"], annotation)
    except (KeyError, ValueError, RecursionError) as error:  # the last: too many brackets
        raise Mismatch from error


def to_toml(value: Any) -> str:
    """Write any value that TOML knows so that it reads back equal (floats keep all their digits)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML does not allow bare.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(name)} = {to_toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    assert isinstance(value, int | float), f"no TOML for {value!r}"
    # Python writes no more than 4300 digits.
    return hex(value) if isinstance(value, int) and value.bit_length() > 64 else repr(value)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else to_toml(name)


def _first_match(alternatives: Any, attempt: Any) -> Any:
    for alternative in alternatives:
        try:
            return attempt(alternative)
        except Mismatch:
            continue
    raise Mismatch
