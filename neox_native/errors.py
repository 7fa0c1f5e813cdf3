"""The one exception that means "the user can mend this", and how it is told."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake in a setting, a file or a command: its message is one sentence (or a few) that names the
    setting, its value, the limit and a way out. Entry points print the message alone and exit with status 1;
    every other exception but an `OSError` is a bug of ours and keeps its traceback.

    It may quote a stranger's file: what no terminal should act on, and what is no text, stands in it as escapes."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text with escapes for what cannot be printed, or encoded."""
    return "".join(each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode() for each in text)


def in_words(error: OSError) -> str:
    """What the system said, and of which file: "No space left on device (runs/a/metrics.jsonl)"."""
    said = error.strerror or str(error) or type(error).__name__
    return said if error.filename is None else f"{said} ({printable(str(error.filename))})"


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Name the file in an `OSError` of the body that does not: one of a write names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def named_as(setting: str, option: str) -> Iterator[None]:
    """Sentences of the body call a setting by the option that the user gave: --device, not run.device."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(setting, option)) from None


def open_standard_streams() -> None:
    """Where the process was started with a stream closed (`<&-`), there is nothing to read, and nobody reads."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Print a `UserError`, or what the system refused, as a sentence and exit with status 1. Where the reader of the
    output has left, as `head` does, nobody is to be told; the status is a shell's for that."""
    open_standard_streams()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (UserError, OSError) as error:
        sentence = f"{in_words(error)}." if isinstance(error, OSError) else str(error)
        if _first_to_say(sentence):
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _first_to_say(sentence: str) -> bool:
    """Hand the sentence to torchrun, whose report ends with it; whether no other rank of this machine has said it.

    torchrun names a file for each rank's error, in a folder for each rank below one of this start.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return True
    said = {"message": sentence, "extraInfo": {"py_callstack": sentence, "timestamp": str(int(time.time()))}}
    name = f"said-{hashlib.sha256(sentence.encode()).hexdigest()[:16]}"
    try:
        Path(file).write_text(json.dumps({"message": said}))
        (Path(file).parents[1] / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # to say it twice is better than not at all
        pass
    return True
