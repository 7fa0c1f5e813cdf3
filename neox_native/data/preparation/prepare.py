"""From documents to token files, in parts that worker processes make and a restart finds again.

The inputs are cut into parts that do not depend on the number of workers. Each finished part lies in PREFIX.parts
under its own name, with a report written last; when all are there they are joined in order and the folder goes away.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from neox_native.data.indexed import IndexedDataset, IndexedWriter
from neox_native.data.preparation import documents
from neox_native.data.preparation.documents import Piece
from neox_native.data.preparation.part import (
    LABELS_SUFFIX,
    Recipe,
    Report,
    load_tokenizer_once,
    prepare_part,
    write_json,
)
from neox_native.data.sidecar import Vocabulary, about, merged
from neox_native.durable import clear_away, disk_errors_named, make_folder, remove_folder, writing
from neox_native.errors import UserError
from neox_native.units import counted, size

PROGRESS_SECONDS = 2.0


@contextmanager
def parts_folder(prefix: Path, plan: dict[str, object], num_parts: int) -> Iterator[Path]:
    """PREFIX.parts, locked, holding finished parts of this very plan or none; removed when the block ends well.

    Raises `UserError` where PREFIX.idx is there already, unless all parts are there too: then an earlier call was killed
    before it removed them.
    """
    folder = prefix.with_name(prefix.name + ".parts")
    with writing(folder):
        if Path(f"{prefix}.idx").exists() and not all(report_file(folder, n).exists() for n in range(num_parts)):
            raise already_there(prefix)
        with disk_errors_named(folder):
            make_folder(folder)
        plan_file = folder / "plan.json"
        if plan_file.exists() and _read(plan_file) != json.loads(json.dumps(plan)):
            raise UserError(
                f"{folder} holds parts of a preparation with other inputs or settings; finish it with those, or "
                "remove the folder."
            )
        write_json(plan_file, plan)
        yield folder
        with disk_errors_named(folder):
            remove_folder(folder)


def already_there(prefix: Path) -> UserError:
    """The error that refuses to overwrite token files; removes what a killed writer left beside them."""
    _clear_away(prefix)
    return UserError(f"{prefix}.idx exists already; remove it or choose another --output.")


def _read(file: Path) -> object:
    """What a .json file holds; None where it is missing or damaged."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def _clear_away(prefix: Path) -> None:
    for each in prefix, Path(f"{prefix}{LABELS_SUFFIX}"):
        clear_away(each)


def prepare(
    inputs: list[str],
    prefix: Path,
    recipe: Recipe,
    *,
    workers: int,
    max_bad_share: float = 0.001,
    log: Callable[[str], None] = print,
) -> Report:
    """Writes PREFIX.idx and PREFIX.bin (and PREFIX_labels for prompts and responses) from the inputs.

    The result does not depend on `workers`; finished parts of an earlier, killed call are kept. Raises `UserError`,
    among others where more than `max_bad_share` of the lines are faulty; then nothing stands under the final names.
    """
    tokenizer = load_tokenizer_once(recipe.tokenizer)
    documents.check_template(recipe.prompt)
    files = documents.find_files(inputs)
    if recipe.prompt and not all(documents.is_jsonl(file) for file in files):
        raise UserError("--prompt reads prompts and responses from .jsonl files, but the inputs hold others; leave those out.")
    parts = documents.cut_into_parts(files)
    stats = {file: [Path(file).stat().st_size, Path(file).stat().st_mtime_ns] for file in files}
    settings = {**asdict(recipe), "tokenizer": tokenizer.name}
    with parts_folder(prefix, {"recipe": settings, "files": stats, "parts": parts}, len(parts)) as folder:
        reports = _make_parts(parts, recipe, folder, workers, log)
        total = Report()
        for report in reports:
            total.add(report)
        if total.bad_share() > max_bad_share:
            raise UserError(
                f"{100 * total.bad_share():.3g}% of the lines are faulty, --max-bad allows {100 * max_bad_share:.3g}%: "
                f"{'; '.join(total.dropped())}. Raise --max-bad and run again, which reuses what is done, or mend the "
                f"input and remove {folder} first."
            )
        if not total.documents:
            remove_folder(folder)
            raise UserError(f"--input holds no document: {_what_was_there(total, files)}. Nothing is written; give text.")
        prefixes = [part_prefix(folder, number) for number in range(len(parts))]
        if Path(f"{prefix}.idx").exists():
            joined = IndexedDataset(prefix)
            if (len(joined), joined.sizes.sum(dtype=np.int64)) != (total.documents, total.tokens):
                raise already_there(prefix)
            _clear_away(prefix)
            return total
        if recipe.prompt:
            join([Path(f"{part}{LABELS_SUFFIX}") for part in prefixes], Path(f"{prefix}{LABELS_SUFFIX}"))
        join(prefixes, prefix, about(Vocabulary.of(tokenizer), settings))
    return total


def _what_was_there(report: Report, files: list[str]) -> str:
    """What inputs without a document hold, in words."""
    return "; ".join(report.dropped()) or f"{files[0]} {f'and {len(files) - 1:,} more ' if files[1:] else ''}has no line"


def part_prefix(folder: Path, number: int) -> Path:
    """Where part `number` lies."""
    return folder / f"part-{number:06d}"


def report_file(folder: Path, number: int) -> Path:
    """Where the report of a finished part lies."""
    return part_prefix(folder, number).with_suffix(".json")


def _make_parts(
    parts: list[list[Piece]], recipe: Recipe, folder: Path, workers: int, log: Callable[[str], None]
) -> list[Report]:
    """Reports of all parts, in order; makes those that are missing."""
    reports: dict[int, Report] = {}
    for number in range(len(parts)):
        if report := _read(report_file(folder, number)):
            reports[number] = Report.of(report)
    if reports:
        log(f"{len(reports):,} of {len(parts):,} parts are there from an earlier run")
    missing = [number for number in range(len(parts)) if number not in reports]
    progress = Progress(sum(_disk_bytes(parts[number]) for number in missing), log)
    with ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (os.getpid(),)) as pool:
        running: dict[Future[Report], int] = {
            pool.submit(prepare_part, parts[number], recipe, part_prefix(folder, number)): number for number in missing
        }
        try:
            for future in as_completed(running):
                number = running[future]
                reports[number] = future.result()
                progress.add(_disk_bytes(parts[number]), reports[number].tokens)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most likely for want of memory; finished parts are kept, so run the same "
                "command again with fewer --workers."
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [reports[number] for number in range(len(parts))]


def _disk_bytes(pieces: list[Piece]) -> int:
    return sum(piece.stop - piece.start for piece in pieces)


def _start_worker(parent: int) -> None:
    """Leaves interrupts to the parent, and ends a worker whose parent was killed: it would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Progress:
    """Prints how far a preparation is, every few seconds and at the end."""

    def __init__(self, total_bytes: int, log: Callable[[str], None]) -> None:
        self.total_bytes, self.log = total_bytes, log
        self.bytes = self.tokens = 0
        self.start = self.last = time.monotonic()

    def add(self, num_bytes: int, tokens: int) -> None:
        """A part is done."""
        self.bytes += num_bytes
        self.tokens += tokens
        now = time.monotonic()
        if now - self.last >= PROGRESS_SECONDS or self.bytes == self.total_bytes:
            self.last, seconds = now, now - self.start
            left = seconds * (self.total_bytes - self.bytes) / max(1, self.bytes)
            self.log(
                f"{100 * self.bytes / max(1, self.total_bytes):.0f}% of {size(self.total_bytes)}, "
                f"{size(self.bytes / seconds)}/s, {self.tokens / seconds:,.0f} tokens/s, {left:.0f} s left"
            )


def join(prefixes: list[Path], output: Path, about: dict[str, Any] | None = None) -> int:
    """Concatenates token files of one type, documents included, and returns the number of tokens.

    Raises `UserError` for files of different types.

    Args:
        about: what the sidecar of the result says, see [Note: the sidecar].
    """
    first = IndexedDataset(prefixes[0])
    with IndexedWriter(output, first.dtype.type, about) as writer:
        for prefix in prefixes:
            source = IndexedDataset(prefix)
            if source.dtype != first.dtype:
                raise UserError(
                    f"{prefix} stores {source.dtype} tokens and {prefixes[0]} {first.dtype}; prepare them with one tokenizer."
                )
            writer.append_files(source)
    return writer.num_tokens


def merge(prefixes: list[Path], output: Path) -> int:
    """`join` for files that were prepared apart, with a sidecar where each has one.

    Raises `UserError` where they were made with different tokenizers, and where OUTPUT.idx is there already.
    """
    if Path(f"{output}.idx").exists():
        raise already_there(output)
    return join(prefixes, output, merged(prefixes))
