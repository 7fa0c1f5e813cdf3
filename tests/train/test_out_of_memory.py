"""Memory that runs out on a rank ends the job with one sentence on all ranks, and with what would make it fit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train as entry
from neox_native.config.check import require
from neox_native.config.load import load
from neox_native.config.schema import Config
from neox_native.engine.step import TrainStep
from neox_native.errors import report_user_errors
from neox_native.metrics import memory as seen
from neox_native.metrics.memory import Recorder, Usage
from neox_native.model.kinds import KINDS
from neox_native.model.transformer import Transformer
from neox_native.plan.memory import memory, peak_bytes
from neox_native.plan.remedies import remedies, with_changes
from neox_native.train.out_of_memory import explanation, out_of_memory
from neox_native.units import size
from tests.checkpoint.small_runs import events, settings, write_corpus
from tests.ranks import run_ranks

CPU = torch.device("cpu")
GIB = 1 << 30


def in_step_2_of_rank_1() -> None:
    """Torch's own error, in the way in which it comes."""
    step = TrainStep.__call__

    def full(self, batch, rate):
        if batch.consumed_samples == 16 and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return step(self, batch, rate)

    TrainStep.__call__ = full


def in_a_stage_of_rank_1() -> None:
    """A CPU's allocator that really has no more, inside of a pipeline, which wraps the error."""
    forward = Transformer.forward

    def full(self, *arguments, **named):
        if dist.get_rank() == 1 and self.training and torch.is_grad_enabled():
            torch.empty(1 << 50)
        return forward(self, *arguments, **named)

    Transformer.forward = full


@pytest.mark.parametrize(
    "fault, layout, said",
    [
        (in_step_2_of_rank_1, "--parallel.dp=2", "in step 2, train, microbatch 0, which asked for 2.00 GiB more."),
        (in_a_stage_of_rank_1, "--parallel.pp=2", "in step 1, train, microbatch 0, which asked for 4096 TiB more."),
    ],
)
def test_a_rank_without_memory_ends_all_with_its_sentence(
    fault: Callable[[], None], layout: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = [layout, "--run.determinism=fast", "--training.micro_batch_size=2"]
    config = require(settings(write_corpus(tmp_path), tmp_path / "run", *changes), 2)

    def rank() -> object:
        fault()
        try:
            with report_user_errors():
                entry.train(config, CPU)
        except SystemExit as leaving:
            return leaving.code

    assert run_ranks(2, rank) == [1, 1]
    sentences = capfd.readouterr().err.split("error: ")[1:]
    assert len(sentences) == 2 and len(set(sentences)) == 1, sentences
    assert sentences[0].startswith("rank 1 (host ") and f"ran out of memory {said}" in sentences[0]
    predicted = sum(memory(config, 1 if "pp" in layout else 0).values())
    assert f"predicted   {size(predicted)} for this rank: parameters " in sentences[0] and "Traceback" not in sentences[0]
    assert "any of these would make it fit" in sentences[0] and "\n  --" in sentences[0]
    (event,) = events(tmp_path / "run", "out of memory")
    assert event["message"] == sentences[0].rstrip("\n") and f"in step {event['step']}," in said


def pythia(*changes: str, ranks: int = 1) -> Config:
    plain = ["--training.activation_checkpointing=none", "--parallel.zero_stage=0"]
    return require(load("configs/pythia/1b.toml", [*plain, *changes]), ranks)


@pytest.mark.parametrize(
    "config, limit",
    [
        (pythia("--training.micro_batch_size=16"), 32 * GIB),
        (pythia("--parallel.tp=2", "--parallel.pp=2", "--training.micro_batch_size=16", ranks=8), 12 * GIB),
        (pythia("--training.precision=fp32", "--training.micro_batch_size=4", ranks=8), 12 * GIB),
    ],
    ids=["one rank", "three axes", "fp32"],
)
def test_each_remedy_works_and_fits(config: Config, limit: float) -> None:
    """What it says are words of the command line; of a pair, neither does alone."""
    parallel = config.parallel
    ranks = parallel.pp * parallel.dp * parallel.tp
    found, least = remedies(config, limit, "NVIDIA A100-SXM4-40GB")
    assert peak_bytes(config) > limit and 2 <= len(found) <= 3 and least.peak_bytes <= min(each.peak_bytes for each in found)
    for remedy in found:
        assert str(remedy).replace("true", "True").split() == [f"--{name}={value}" for name, value in remedy.changes.items()]
        changed = require(with_changes(config, remedy.changes), ranks)
        assert peak_bytes(changed) == remedy.peak_bytes <= limit
        assert changed.model == config.model and changed.training.global_batch_size == config.training.global_batch_size
        if "parallel.dp" not in remedy.changes and len(remedy.changes) == 2:
            assert all(peak_bytes(with_changes(config, {name: value})) > limit for name, value in remedy.changes.items())
    sizes = [len(set(remedy.changes) - {"parallel.dp"}) for remedy in found]
    assert sizes == sorted(sizes) and max(sizes) <= 2


def test_groups_of_zero_may_become_one() -> None:
    config = pythia("--parallel.zero_stage=3", "--parallel.zero_shard_size=2", ranks=8)
    found, _ = remedies(config, 0.9 * peak_bytes(config), "NVIDIA A100-SXM4-40GB")
    assert "--parallel.zero_shard_size=0" in map(str, found)


def test_an_explanation_holds_the_plan_against_the_device() -> None:
    """The plan's error is taken along: a rank that held more than was predicted for it will do so again."""
    config = pythia("--training.micro_batch_size=8")
    predicted = sum(memory(config, 0).values())
    usage = Usage(allocated=predicted, reserved=predicted + GIB, others=GIB, total=predicted + 3 * GIB)
    allocated, said, head, *offers = explanation(config, 0, usage, 0, "NVIDIA H100 80GB HBM3")
    assert f"{size(predicted)} by tensors, 1 GiB kept free by torch's allocator, 1 GiB by the driver and others; " in allocated
    assert said.startswith(f"  predicted   {size(predicted)} for this rank: ")
    assert all(f"{kind.replace('_', ' ')} {size(number)}" in said for kind, number in memory(config, 0).items())
    assert head == "any of these would make it fit, as predicted for the busiest rank:" and offers[0].startswith("  --")
    worse = explanation(config, 0, replace(usage, allocated=3 * predicted, total=predicted + GIB), 0, "NVIDIA H100 80GB HBM3")
    assert worse[2:] != [head, *offers]
    hopeless = explanation(config, 0, replace(usage, total=2 * GIB), 0, "NVIDIA H100 80GB HBM3")[-1]
    assert hopeless.startswith("no one or two settings make it fit on 1 rank: --training.") and "take more ranks" in hopeless
    elastic = replace(config, run=replace(config.run, determinism="elastic"))
    assert 'run.determinism = "elastic" refuses some; recomputation never' in explanation(elastic, 0, usage, 0, "cpu")[2]


def test_a_kind_without_costs_is_not_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "feed_forward", replace(KINDS["feed_forward"], costs=None))
    lines = explanation(pythia(), 0, Usage(GIB, GIB, 0, 2 * GIB), 0, "cpu")
    assert "1 GiB by the process" in lines[0] and "does not state its costs" in lines[1] and len(lines) == 2


@pytest.mark.parametrize(
    "error, known",
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("NCCL error in: a.cpp:1, unhandled cuda error\nCuda failure 2 'out of memory'"), True),
        (RuntimeError("Saving failed on rank 2, host b: OutOfMemoryError: CUDA out of memory."), False),  # another rank's
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, known: bool) -> None:
    wrapper = RuntimeError("[Stage 1] failed to run forward")
    wrapper.__cause__ = error
    assert (out_of_memory(wrapper) is error) == (out_of_memory(error) is error) == known


def test_a_snapshot_is_taken_while_memory_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's call, on a GPU that is not there."""
    attached: list[Callable[..., None]] = []
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", attached.append, raising=False)
    histories: list[tuple] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *given, **named: histories.append(given))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": []})
    for name, value in {"mem_get_info": (GIB, 80 * GIB), "memory_reserved": 70 * GIB, "memory_allocated": 60 * GIB}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    path = tmp_path / seen.FOLDER / "rank_0.pickle"
    recorder = Recorder(torch.device("cuda"), path, history=False)
    assert not histories and not path.exists()
    attached[0](0, 2 * GIB, 80 * GIB, GIB)
    assert recorder.usage == Usage(60 * GIB, 70 * GIB, 9 * GIB, 80 * GIB) and recorder.requested == 2 * GIB
    assert recorder.written and pickle.loads(path.read_bytes()) == {"segments": []}
    Recorder(torch.device("cuda"), path, history=True)
    Recorder(CPU, path, history=True)
    assert len(attached) == 2 and histories == [("all",)]
