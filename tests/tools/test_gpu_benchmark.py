"""The benchmark of a GPU, on toys on a CPU: all but the device is what runs there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from neox_native.config.schema import Config, Model, Parallel, Training
from neox_native.errors import UserError
from tests.ranks import run_ranks
from tools import benchmark
from tools.benchmarks import gpu, gpu_attention, gpu_training
from tools.benchmarks.gpu import Subject, Work

MODEL = Model(num_layers=1, hidden_size=32, num_heads=2, seq_length=16, vocab_size=64, vocab_multiple_of=32)
TOY = Config(model=MODEL, training=Training(global_batch_size=2, micro_batch_size=2), parallel=Parallel(dp=1))
WORK = Work("cpu", {"toy": TOY}, (8, 16), 16, 2, 32, 1, dict.fromkeys(gpu.pythia().seconds, 60.0))


def test_every_table_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_settings: function)  # a compiler takes longer than all of this
    monkeypatch.setattr("neox_native.parallel.assemble.within_budget", lambda *_: None)
    monkeypatch.setattr(gpu_training, "forget", lambda _device: None)
    monkeypatch.setattr(gpu_attention, "seconds_of", lambda work, _device: (work(), 1e-3)[1])
    for name in ("copy_bytes_per_second", "products_flops_per_second"):
        monkeypatch.setattr(f"neox_native.plan.calibrate.{name}", lambda *_: 1e12)

    def tables() -> dict[str, list[list[str]]]:
        return {subject.title: list(subject.rows(*subject.arguments)) for subject in gpu.subjects(WORK)}

    (found,) = run_ranks(1, tables)
    assert list(found) == ["Rates", "toy", "toy beside peers", "Causal attention", "Packed documents, forward and backward"]
    assert [row[0] for row in found["toy"]] == list(gpu_training.CONFIGURATIONS) and len(found["toy beside peers"]) == 4
    for row in found["toy"] + found["toy beside peers"]:
        assert len(row) == len(gpu_training.COLUMNS) and "failed" not in row[1]
    assert all(row[6] for row in found["toy"]), "memory is planned"
    for row in found["Packed documents, forward and backward"]:
        assert all(float(figure) < 1e-2 for figure in row[3:]), "the same gradients, recomputed or not"
    assert ["8", "flash"] == found["Causal attention"][0][:2] and float(found["Causal attention"][0][2]) >= 0


def three(delay: float) -> Iterator[list[str]]:
    yield ["first"]
    if delay == -1:
        raise MemoryError("gone")
    if delay < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    yield ["second"]
    time.sleep(delay)
    yield ["third"]


@pytest.mark.parametrize(
    "delay, seconds, rows",
    [
        (0.0, 60.0, ["first", "second", "third"]),
        (-1.0, 60.0, ["first", "failed: MemoryError: gone"]),
        (600.0, 12.0, ["first", "second", "the rest was not done within 12 s"]),
        (-2.0, 60.0, ["first", "ended with exit code -9"]),
    ],
)
@pytest.mark.slow
def test_a_subject_has_its_own_process_and_its_time(delay: float, seconds: float, rows: list[str]) -> None:
    subject = Subject("Toys", ["name", "figure"], three, (delay,), seconds)
    shown = list(gpu.table(subject, time.monotonic() + 100, gpu.in_process))
    assert shown == ["Toys:\n", "| name | figure |", "| --- | --- |", *(f"| {row} |  |" for row in rows)]


def test_what_runs_out_of_time_or_memory_is_a_row() -> None:
    subject = Subject("Toys", ["name"], three, (0.0,), 5.0)
    assert "| no time was left |" in list(gpu.table(subject, time.monotonic() - 1, gpu.in_process))

    def make(_device: torch.device) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    assert gpu_training.measured(TOY, torch.device("cpu"), 1, make, None) == ["failed: out of memory"]


def test_pythia_fits_into_its_time_and_is_one_microbatch_a_step() -> None:
    work = gpu.pythia()
    assert all(each.training.micro_batch_size == each.training.global_batch_size for each in work.models.values())
    models = ["Pythia 1B", "Pythia 2.8B", "Pythia 1.4B"]
    subjects = gpu.subjects(work)
    assert [each.title for each in subjects][:4] == ["Rates", *models], "before all that may be left out"
    assert next(iter(gpu_training.CONFIGURATIONS)) == "compiled with the loss, none"
    assert sum(each.seconds for each in subjects) <= gpu.SECONDS < 8 * 60


def test_a_row_is_printed_when_it_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []

    def rows() -> Iterator[list[str]]:
        for name in ("first", "second"):
            yield [name]
            shown.append(capsys.readouterr().out)

    monkeypatch.setattr(gpu, "choose_allocator", lambda: None)
    monkeypatch.setattr(gpu, "subjects", lambda _work: [Subject("Toys", ["name"], rows, (), 5.0)])
    monkeypatch.setattr(gpu, "in_process", lambda subject, _seconds: subject.rows())
    assert gpu.run() == "All of it took 0 s."
    assert shown == ["Toys:\n\n| name |\n| --- |\n| first |\n", "| second |\n"]


def test_without_a_gpu_it_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^tools/benchmark.py --gpu needs a GPU, and torch \S+ sees none here; .*\.$"):
        benchmark.main(["--gpu"])
    assert not capsys.readouterr().out
