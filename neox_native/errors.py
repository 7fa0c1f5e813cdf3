"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in a setting, a file or a command: its message is one sentence (or a few) that names the
    setting, its value, the limit and a way out. Entry points print the message alone and exit with status 1;
    every other exception is a bug of ours and keeps its traceback."""


@contextmanager
def report_user_errors(prefix: str = "error") -> Iterator[None]:
    """Print a `UserError` as a sentence and exit with status 1."""
    try:
        yield
    except UserError as error:
        print(f"{prefix}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
