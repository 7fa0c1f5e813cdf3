"""What a run writes down: a console line and one JSON object per logged step, TensorBoard scalars, and events."""

from __future__ import annotations

import datetime
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from neox_native.durable import make_folder, replacing, sync_file, sync_folder
from neox_native.errors import UserError
from neox_native.plain_files import append_to
from neox_native.units import count, size

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
OF_A_STEP = ("evaluation", "bad step", "empty step")
"""Kinds of events that a step has once, however often the run is restarted before it."""


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl. A loss or norm that is not finite is written as null, because JSON has no word for it."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    consumed_samples: int
    tokens_per_second: float
    step_seconds: float
    tflops_per_device: float
    mfu: float | None
    mfu_causal: float | None
    peak_memory_bytes: int
    batch_hash: str


def strict_json(values: dict[str, Any]) -> str:
    """One line of JSON that every parser takes: floats in full precision, null where a float is not finite."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite, allow_nan=False)


@dataclass(frozen=True)
class Scale:
    """What a step's numbers are seen against on the console."""

    total_steps: int
    """Steps of the run."""
    sample_tokens: int
    """Tokens of a sample."""
    memory_bytes: int
    """Memory that the device has."""


def console_line(record: StepRecord, scale: Scale, elapsed_seconds: float, extra: dict[str, Any] | None = None) -> str:
    """A step for a human: loss, rate, norm, speed, memory, tokens seen, time since the start and left at this speed."""
    left = datetime.timedelta(seconds=round((scale.total_steps - record.step) * record.step_seconds))
    elapsed = datetime.timedelta(seconds=round(elapsed_seconds))
    share = record.peak_memory_bytes / scale.memory_bytes
    extras = (extra or {}).items()
    parts = [
        f"step {record.step:>{len(str(scale.total_steps))}}/{scale.total_steps}",
        f"loss {record.loss:.4f}",
        f"lr {record.learning_rate:.2e}",
        f"grad norm {record.grad_norm:.3f}",
        f"{record.step_seconds:.3g} s/step",
        f"{record.tokens_per_second:,.0f} tokens/s",
        f"{record.tflops_per_device:.3g} TFLOP/s",
        *([] if record.mfu is None else [f"MFU {record.mfu:.1%} ({record.mfu_causal:.1%} causal)"]),
        f"peak memory {size(record.peak_memory_bytes)} ({share:.0%})",
        f"{count(record.consumed_samples * scale.sample_tokens)} tokens seen",
        f"{elapsed} elapsed",
        f"{left} left",
        *(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in extras),
    ]
    return "  ".join(parts)


def cut_off(file: Path, keeps: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines of a log that `keeps` does not want, and what is no whole line: torn by a kill, or no JSON object."""
    lines = _lines(file)
    kept = [line for line in lines if (said := _said(line)) is not None and keeps(said)]
    if len(kept) < len(lines):
        with replacing(file) as stream:
            stream.writelines(kept)


def _lines(file: Path) -> list[bytes]:
    """Its lines with their ends, none where there is no file; a line of bytes ends at a line feed alone."""
    return list(io.BytesIO(file.read_bytes())) if file.is_file() else []


def read_log(file: Path) -> Iterator[dict[str, Any]]:
    """What the whole lines of a log say; nothing where there is no such file."""
    return (said for line in _lines(file) if (said := _said(line)) is not None)


def mend_logs(folder: Path, resumed_step: int) -> None:
    """Drop what a killed run has torn, and the steps beyond the resumed one, which will be taken again; whatever else happened
    to the run stays."""
    cut_off(folder / METRICS, lambda said: _step_of(said) <= resumed_step)
    cut_off(folder / EVENTS, lambda said: said.get("kind") not in OF_A_STEP or _step_of(said) <= resumed_step)


def check_logs(folder: Path) -> None:
    """Raise the `OSError` that `Writers` would meet at logs which are links, pipes or another user's; changes nothing."""
    for file in folder / METRICS, folder / EVENTS:
        if os.path.lexists(file):
            append_to(file).close()


def _said(line: bytes) -> dict[str, Any] | None:
    """What a line says; None for one that is not whole."""
    try:
        said = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _step_of(said: dict[str, Any]) -> float:
    """The line's step; infinity where it tells none."""
    step = said.get("step")
    return step if type(step) is int else math.inf


def _evaluation(said: dict[str, Any]) -> tuple[float, float] | None:
    """Loss and step, where what a line of events.jsonl says is an evaluation with a loss."""
    if said.get("kind") != "evaluation":
        return None
    loss = said.get("loss")
    return (loss, _step_of(said)) if isinstance(loss, float) and math.isfinite(loss) else None


def _event(kind: str, step: int, message: str, **values: Any) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"time": now, "kind": kind, "step": step, "message": message, **values}


def write_last_event(folder: Path, kind: str, step: int, message: str) -> None:
    """Write down what ended a run that has begun, whose `Writers` are closed; where the disk refuses, it is lost."""
    if (folder / EVENTS).is_file():
        with suppress(OSError), append_to(folder / EVENTS) as file:
            file.write(strict_json(_event(kind, step, message)) + "\n")


class Writers:
    """Everything that one rank writes about a run; the others hold none.

    Args:
        folder: the run's folder.
        resumed_step: steps already done (0 for a new run); what was logged beyond is cut off.
        scale: of the run, for the console.
        config_text: the resolved config, shown by TensorBoard as text.
        tensorboard: write TensorBoard files beside metrics.jsonl.

    Raises:
        UserError: from everything here, where the disk is full or the folder may not be written.
    """

    def __init__(self, folder: Path, resumed_step: int, scale: Scale, config_text: str, tensorboard: bool) -> None:
        self._folder, self._scale, self._started = folder, scale, time.monotonic()
        self._board = None
        with self._writing(), ExitStack() as opened:
            make_folder(folder)
            mend_logs(folder, resumed_step)
            self._metrics: TextIO = opened.enter_context(append_to(folder / METRICS))
            self._events: TextIO = opened.enter_context(append_to(folder / EVENTS))
            self.best = min(filter(None, map(_evaluation, read_log(folder / EVENTS))), default=None)
            """The lowest validation loss of the run and its step, earlier starts included."""
            sync_folder(folder)
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # half a second that other processes need not spend

                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)
                self._board.add_text("config", "```toml\n" + config_text + "\n```", resumed_step)
            opened.pop_all()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Run the body, whose trouble with the disk is the user's to mend."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"Writing the log in {self._folder} failed: {error.strerror or error}; mend that and start again, and the run "
                "goes on at its newest checkpoint."
            ) from None

    def step(self, record: StepRecord, extra: dict[str, Any] | None = None, metrics: dict[str, float] | None = None) -> None:
        """Write one logged step with its named metrics. `extra` (a loss scale) goes to the console and TensorBoard alone."""
        metrics, extra = metrics or {}, {**(metrics or {}), **(extra or {})}
        with self._writing():
            self._metrics.write(strict_json(asdict(record) | metrics) + "\n")
            print(console_line(record, self._scale, self.elapsed_seconds(), extra))
            self._scalars({**asdict(record), **extra}, record.step, "train")

    def event(self, kind: str, step: int, message: str, **values: Any) -> None:
        """Write something that is no training step: an evaluation, a skipped update, a checkpoint, a straggler."""
        said = _event(kind, step, message, **values)
        with self._writing():
            self._events.write(strict_json(said) + "\n")
            print(message)
            self._scalars(values, step, kind)
        if found := _evaluation(said):
            self.best = min(found, self.best or found)

    def elapsed_seconds(self) -> float:
        """Since this start of the run."""
        return time.monotonic() - self._started

    def _scalars(self, values: dict[str, Any], step: int, prefix: str) -> None:
        if self._board is None:
            return
        for name, value in values.items():
            if name != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(f"{prefix}/{name}", value, step)

    def sync(self) -> None:
        """Flush the lines to the disk: before a checkpoint is, since a run that goes on from there will not write them again."""
        with self._writing():
            for file in self._metrics, self._events:
                sync_file(file)

    def close(self) -> None:
        """Flush and close all files."""
        with self._writing(), ExitStack() as closing:  # one that fails keeps none of the others open
            closing.callback(self._metrics.close)
            closing.callback(self._events.close)
            if self._board is not None:
                closing.callback(self._board.close)
