"""One GPU against the CPU and against itself."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch

import train as entry
from neox_native.config.check import require
from neox_native.config.schema import Config, Model, Parallel, Run, Training
from neox_native.data.tokenizers import byte_tokenizer
from neox_native.errors import UserError
from neox_native.inference.generator import Generator, Limits
from neox_native.inference.load import inference_mesh, load_model
from neox_native.inference.runner import Runner
from neox_native.inference.sampling import Sampling
from neox_native.launch import Launch, pick_device
from neox_native.train.out_of_memory import out_of_memory_explained
from neox_native.train.start import choose_arithmetic
from tests.checkpoint.small_runs import settings, write_corpus
from tests.inference.models import MODELS as SERVED, PROMPTS, checkpoints
from tests.ranks import run_ranks
from tests.train.runs import MODELS, Outcome, compare, config_of, train
from tools.benchmarks.gpu_attention import RECOMPUTED, distance, gradients
from tools.benchmarks.gpu_training import ours, tokens_of, what_waits

pytestmark = pytest.mark.gpu
ALONE = Parallel(dp=1)
EXACT = Run(device="cuda", determinism="bitwise")
"""Without TF32, and bit by bit."""


def on_gpu(config: Config) -> Outcome:
    """Three steps on the GPU."""
    (outcome,) = run_ranks(1, train, config, device=config.run.device)
    return outcome


def same_bits(mine: Outcome, theirs: Outcome) -> None:
    """Assert that two runs are equal bit by bit."""
    assert (mine.losses, mine.norms, mine.evaluation) == (theirs.losses, theirs.norms, theirs.evaluation)
    for what in ("gradients", "weights"):
        for name, (_, tensor) in getattr(mine, what).of.items():
            assert torch.equal(tensor, getattr(theirs, what).of[name][1]), name


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", [name for name in MODELS if name != "dropping"])
def test_a_gpu_draws_the_curve_of_a_cpu(model: str, recompute: str) -> None:
    compare(ALONE, model, run=EXACT, relative=1e-4, micro_batch_size=2, activation_checkpointing=recompute)


@pytest.mark.parametrize("masked", [False, True])
def test_adamw_is_that_of_a_cpu(masked: bool) -> None:
    compare(ALONE, optimizer="adamw", masked=masked, run=EXACT, relative=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_fp32(precision: str) -> None:
    low, full = (on_gpu(config_of(ALONE, run=EXACT, precision=each)) for each in (precision, "fp32"))
    assert low.losses == pytest.approx(full.losses, rel=1e-2) and low.norms == pytest.approx(full.norms, rel=5e-2)


@pytest.mark.parametrize("determinism", ["bitwise", "elastic"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_repeats_bit_by_bit_recomputed_or_not(precision: str, determinism: str) -> None:
    run = Run(device="cuda", determinism=determinism)
    one, again, recomputed = (
        on_gpu(config_of(ALONE, "dropping", "adamw", run=run, precision=precision, activation_checkpointing=each))
        for each in ("none", "none", "selective")
    )
    same_bits(one, again)
    same_bits(one, recomputed)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks_and_loss_are_eager_ones_to_rounding(recompute: str) -> None:
    run = Run(device="cuda")
    settings = {"micro_batch_size": 2, "activation_checkpointing": recompute}
    eager = config_of(ALONE, run=run, **settings)
    compare(ALONE, compiled=True, twin=eager, run=run, relative=1e-2, **settings)  # TF32's rounding


@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_packed_documents_without_a_mask_are_those_with_one(head_size: int) -> None:
    model = Model(num_layers=1, hidden_size=2 * head_size, num_heads=2, seq_length=512, vocab_size=128)

    def off() -> list[float]:
        device = pick_device("cuda", Launch.from_environment())
        reference, _ = gradients(model, 2, device, None, with_mask=True)
        return [distance(gradients(model, 2, device, how, with_mask=False)[0], reference) for how in RECOMPUTED.values()]

    ((none, *recomputed),) = run_ranks(1, off, device="cuda")
    assert none < 5e-2 and recomputed == pytest.approx([none] * len(recomputed), rel=1e-3)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_nothing(precision: str, recompute: str) -> None:
    training = Training(
        global_batch_size=2, micro_batch_size=2, precision=precision, activation_checkpointing=recompute, spike_threshold=3.0
    )
    model = Model(num_layers=2, hidden_size=64, num_heads=4, seq_length=64, vocab_size=256, hidden_dropout=0.1)
    config = Config(model=model, training=training, parallel=ALONE)

    def waits() -> str:
        device = pick_device("cuda", Launch.from_environment())
        choose_arithmetic(config.run, device)
        step, tokens_BT = ours(config, False, device), tokens_of(config, device)
        step(tokens_BT)
        return what_waits(step, tokens_BT, device)

    assert run_ranks(1, waits, device="cuda") == ["nothing"]


@pytest.mark.parametrize("name", SERVED)
def test_greedy_tokens_are_those_of_a_cpu_with_a_cache_and_without(name: str, tmp_path: Path) -> None:
    path = checkpoints(tmp_path)[name]

    def tokens(device_type: str) -> list[list[int]]:
        device = pick_device(device_type, Launch.from_environment())
        runner = Runner(load_model(path, inference_mesh(1, 1, 1, device), "fp32", device))
        limits = Limits(max_new_tokens=10, ignore_end=True)
        rows = [Generator(runner, byte_tokenizer(), cached)(PROMPTS, Sampling(), limits) for cached in (True, False)]
        return [[row.new_tokens for row in each] for each in rows]

    (expected,), (found,) = run_ranks(1, tokens, "cpu"), run_ranks(1, tokens, "cuda", device="cuda")
    assert found == expected


def test_memory_that_runs_out_is_told_with_a_snapshot(tmp_path: Path) -> None:
    config = config_of(ALONE, run=Run(device="cuda", dir=str(tmp_path), memory_history=True))

    class Watchdog:
        rank = step = 0

        def where(self) -> str:
            return "step 1"

        def tell(self, text: str) -> str:
            return text

    def fill() -> str:
        device = pick_device("cuda", Launch.from_environment())
        torch.cuda.set_per_process_memory_fraction(0.05, device)
        kept = []
        try:
            with out_of_memory_explained(config, device, Watchdog()):
                while True:
                    kept.append(torch.empty(1 << 28, dtype=torch.uint8, device=device))
        except UserError as told:
            return str(told)

    (told,) = run_ranks(1, fill, device="cuda")
    assert "ran out of memory in step 1, which asked for 256 MiB more." in told and "predicted" in told
    (snapshot,) = (tmp_path / "out_of_memory").iterdir()
    assert pickle.loads(snapshot.read_bytes())["segments"]


def test_a_run_logs_evaluates_saves_and_profiles(tmp_path: Path) -> None:
    changes = ["--run.device=cuda", "--run.profile=2:4", "--parallel.dp=1", "--training.steps=4"]
    changes += ["--evaluation.every=2", "--evaluation.batches=1"]
    config = require(settings(write_corpus(tmp_path), tmp_path / "run", *changes), 1)
    run_ranks(1, lambda: entry.train(config, pick_device("cuda", Launch.from_environment())), device="cuda")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4 and all(line["peak_memory_bytes"] > 0 and math.isfinite(line["loss"]) for line in lines)
    assert (tmp_path / "run" / "checkpoints" / "step_000000004").is_dir()
    assert {path.name.split(".", 1)[1] for path in (tmp_path / "run" / "profile").iterdir()} == {"txt", "pt.trace.json.gz"}
