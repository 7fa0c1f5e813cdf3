"""What one GPU does with this code, in under eight minutes: its rates, attention, Pythia in five configurations, and peers.

Every subject runs in a process of its own, so that memory is its own, and has so many seconds; rows that it had not finished are
missing, and a line says so. What runs out of memory, fails or dies is a row that says so. Rows are printed as they are measured.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from neox_native.config.load import CONFIGS_FOLDER, load
from neox_native.config.schema import Config
from neox_native.errors import UserError
from neox_native.train.__main__ import choose_allocator
from tools.benchmarks import gpu_attention, gpu_training

SECONDS = 450.0
"""For all subjects together."""
Row = list[str]


@dataclass(frozen=True)
class Subject:
    """One table."""

    title: str
    columns: Row
    rows: Callable[..., Iterator[Row]]
    """Yields a row as soon as it is measured."""
    arguments: tuple[Any, ...]
    seconds: float
    """Most that it may take."""


@dataclass(frozen=True)
class Work:
    """What is measured: Pythia on a GPU, or toys on a CPU, in a test."""

    device_type: str
    models: dict[str, Config]
    """The first is the one that rates and peers are measured on."""
    head_sizes: tuple[int, ...]
    seq_length: int
    num_sequences: int
    hidden_size: int
    """Of attention: as many heads as fit."""
    steps: int
    """Of each configuration, warmup left out."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each sort of subject."""


def pythia() -> Work:
    """One microbatch a step, as on 64 GPUs."""
    models = {}
    for size, micro_batch in (("1b", 16), ("2.8b", 8), ("1.4b", 16)):
        given = [f"--training.micro_batch_size={micro_batch}", f"--training.global_batch_size={micro_batch}", "--parallel.dp=1"]
        models[f"Pythia {size.upper()}"] = load(CONFIGS_FOLDER / "pythia" / f"{size}.toml", given)
    seconds = {"rates": 30.0, "model": 85.0, "peers": 65.0, "attention": 45.0, "documents": 50.0}
    return Work("cuda", models, (64, 80, 128, 256), seq_length=2048, num_sequences=8, hidden_size=2560, steps=15, seconds=seconds)


def subjects(work: Work) -> list[Subject]:
    """Dearest to know first. Together they may take no longer than `SECONDS`, so that none takes another's time."""
    shape = (work.device_type, work.head_sizes, work.seq_length, work.num_sequences, work.hidden_size)
    first, config = next(iter(work.models.items()))
    attention = ["head size", "kernel", "forward TFLOP/s", "forward and backward TFLOP/s"]
    documents = ["head size", "FlexAttention ms", "mask ms", "gradients off by", "selective", "full"]
    trained = {name: (each, work.device_type, work.steps) for name, each in work.models.items()}
    models = [
        Subject(name, gpu_training.COLUMNS, gpu_training.configurations, arguments, work.seconds["model"])
        for name, arguments in trained.items()
    ]
    return [
        Subject("Rates", ["", "measured", "of the peak"], gpu_attention.rates, (config, work.device_type), work.seconds["rates"]),
        *models,
        Subject(f"{first} beside peers", gpu_training.COLUMNS, gpu_training.peers, trained[first], work.seconds["peers"]),
        Subject("Causal attention", attention, gpu_attention.backends, shape, work.seconds["attention"]),
        Subject("Packed documents, forward and backward", documents, gpu_attention.documents, shape, work.seconds["documents"]),
    ]


def require_device() -> None:
    """Raise `UserError` where there is no GPU."""
    if not torch.cuda.is_available():
        raise UserError(
            f"tools/benchmark.py --gpu needs a GPU, and torch {torch.__version__} sees none here; the other benchmarks run on a CPU."
        )


def run() -> str:
    """Print every row of all tables when it is measured, so that who ends this early has what was done; return the last line."""
    choose_allocator()  # for the processes of the subjects
    begin = time.monotonic()
    for subject in subjects(pythia()):
        for line in table(subject, begin + SECONDS, in_process):
            print(line, flush=True)
        print()
    return f"All of it took {time.monotonic() - begin:.0f} s."


def table(subject: Subject, deadline: float, measure: Callable[[Subject, float], Iterator[Row]]) -> Iterator[str]:
    """The lines of a subject's Markdown table, as they are measured, until its time is up, the deadline of all included."""
    seconds = min(subject.seconds, deadline - time.monotonic())
    rows = measure(subject, seconds) if seconds > 0 else [["no time was left"]]
    width = len(subject.columns)
    yield f"{subject.title}:\n"
    for row in itertools.chain([subject.columns, ["---"] * width], rows):
        yield f"| {' | '.join(row + [''] * (width - len(row)))} |"


def in_process(subject: Subject, seconds: float) -> Iterator[Row]:
    """The rows of a subject, measured in a fresh process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, subject.rows, subject.arguments), daemon=True)
    process.start()
    theirs.close()
    end = time.monotonic() + seconds
    try:
        while ours.poll(max(0.0, end - time.monotonic())):
            yield ours.recv()
        yield [f"the rest was not done within {seconds:.0f} s"]
    except (EOFError, OSError):  # its end of the pipe is closed, at times amid a row: all is done, or the process died
        process.join(10)
        if process.exitcode:
            yield [f"ended with exit code {process.exitcode}"]
    finally:
        process.kill()
        process.join()


def serve(pipe: Connection, rows: Callable[..., Iterator[Row]], arguments: tuple[Any, ...]) -> None:
    """The life of a subject's process."""
    try:
        for row in rows(*arguments):
            pipe.send(row)
    except Exception as error:
        traceback.print_exc()
        pipe.send([f"failed: {gpu_training.first_line(error)}"])
    pipe.close()
