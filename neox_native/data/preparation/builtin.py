"""Real text that is always at hand: the sources of Python's standard library, without its tests (about 12 MB)."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from neox_native.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from neox_native.data.sidecar import Vocabulary, about
from neox_native.data.tokenizers import Tokenizer
from neox_native.durable import clear_away, writing
from neox_native.errors import UserError, in_words
from neox_native.launch import Ranks
from neox_native.plain_files import at_home
from neox_native.units import size

PYTHON_STDLIB = "builtin:python-stdlib"
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
PROGRESS_SECONDS = 2.0


def stdlib_sources() -> list[Path]:
    """Paths of the standard library's sources relative to its folder, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(path for path in paths if SKIPPED_FOLDERS.isdisjoint(path.parts))


def prepare_python_stdlib(tokenizer: Tokenizer, cache_dir: str, ranks: Ranks) -> str:
    """Prefix of the corpus in `cache_dir`; the first rank prepares it where it is missing, the others wait.

    Several runs prepare it one after another, so once. The folder's name carries the Python version, the tokenizer and
    the hash of the sources, so a prepared corpus is never stale. Raises `UserError` where the corpus is absent after the
    wait.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {path: (root / path).read_bytes() for path in stdlib_sources()}
    digest = hashlib.sha256()
    for path, text in texts.items():
        digest.update(str(path).encode() + b"\0" + str(len(text)).encode() + b"\0" + text)
    corpus_hash = digest.hexdigest()[:16]
    folder = at_home(cache_dir) / f"python-stdlib-{platform.python_version()}-{tokenizer.name}-{corpus_hash}"
    prefix = str(folder / "text")
    try:
        if ranks.is_first and _opens(prefix):
            clear_away(folder)
            clear_away(Path(prefix))
        elif ranks.is_first:
            with writing(folder, wait=True):
                if not _opens(prefix):
                    ranks.say(f"{PYTHON_STDLIB}: preparing {len(texts):,} files into {folder}")
                    _write(prefix, texts, tokenizer, ranks.say)
    except (UserError, OSError) as error:
        cause = error.__cause__ or error
        said = in_words(cause) if isinstance(cause, OSError) else str(error).rstrip(".")
        raise UserError(
            f"data.cache_dir = {cache_dir!r} cannot keep {PYTHON_STDLIB}: {said}; set it to a folder that can be written."
        ) from error
    finally:
        ranks.barrier()
    ranks.say(f"{PYTHON_STDLIB}: Python {platform.python_version()}, {len(texts):,} files, sha256 {corpus_hash}")
    if not Path(prefix + ".idx").exists():
        raise UserError(
            f"data.cache_dir = {cache_dir!r}: {prefix}.idx is missing after the writing rank prepared it; "
            "on several machines this folder must be shared, and Python the same everywhere."
        )
    return prefix


def _opens(prefix: str) -> bool:
    """Whether a whole corpus is there: one that was damaged since is prepared again."""
    try:
        return bool(IndexedDataset(prefix))
    except UserError:
        return False


def _write(prefix: str, texts: dict[Path, bytes], tokenizer: Tokenizer, log: Callable[[str], None]) -> None:
    total, done, next_report = sum(map(len, texts.values())), 0, time.monotonic() + PROGRESS_SECONDS
    end_of_document = np.array([tokenizer.eod_id], np.uint32)
    made_by = about(Vocabulary.of(tokenizer), {"input": PYTHON_STDLIB, "append_eod": True})
    with IndexedWriter(prefix, token_dtype(tokenizer.vocab_size), made_by) as writer:
        for text in texts.values():
            writer.add(tokenizer.encode(text.decode("utf-8", errors="replace")))
            writer.add_document(end_of_document)
            done += len(text)
            if time.monotonic() >= next_report:
                log(f"{PYTHON_STDLIB}: {size(done)} of {size(total)}")
                next_report = time.monotonic() + PROGRESS_SECONDS
    log(f"{PYTHON_STDLIB}: {size(total)}, {writer.num_tokens:,} tokens written")
