"""Which checkpoints a run may go on from in bitwise and elastic mode: those whose sums and masks it repeats, and no others."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from neox_native.config.check import require
from neox_native.config.load import load
from neox_native.config.schema import Config
from neox_native.config.settings import SECTIONS, SETTINGS
from neox_native.errors import UserError
from neox_native.launch import Ranks
from neox_native.model.masks import seed_masks
from neox_native.train.fits import (
    WITHIN_A_MICROBATCH, check_fits, metadata, require_one_kind, runtime_of, what_becomes_of_numbers,
)  # fmt: skip
from neox_native.train.start import choose_arithmetic
from neox_native.train.state import SHAPE_THE_TRAINING, copies

BASE = [
    "--run.determinism=bitwise", "--model.num_layers=8", "--parallel.pp=2", "--parallel.dp=2", "--parallel.tp=2",
    "--parallel.pipeline_schedule=interleaved_1f1b", "--parallel.virtual_stages=2",
]  # fmt: skip
OTHER = {
    "parallel.pp": ["--parallel.pp=1"],
    "parallel.dp": ["--parallel.dp=4"],
    "parallel.tp": ["--parallel.tp=4"],
    "parallel.sequence_parallel": ["--parallel.sequence_parallel=true"],
    "parallel.pipeline_schedule": ["--parallel.pipeline_schedule=looped_bfs"],
    "parallel.virtual_stages": ["--parallel.virtual_stages=4"],
    "parallel.stage_layers": ["--parallel.stage_layers=[3, 1, 2, 2]"],
    "parallel.zero_stage": ["--parallel.zero_stage=1"],
    "parallel.zero_shard_size": ["--parallel.dp=4", "--parallel.zero_stage=1", "--parallel.zero_shard_size=2"],
    "training.micro_batch_size": ["--training.micro_batch_size=2"],
    "training.precision": ["--training.precision=bf16"],
    "parallel.async_tp": [],
    "compile.enabled": [],
}
RUNTIME = runtime_of(torch.device("cpu"), Ranks())


def checked(*settings: str, unchecked: bool = False) -> Config:
    config = load(None, settings)
    parallel = config.parallel
    return config if unchecked else require(config, parallel.pp * max(parallel.dp, 1) * parallel.tp)


def other_than(dotted: str, *settings: str) -> Config:
    """A run that differs in one setting; what these settings refuse by themselves stands for a checkpoint of a fast run."""
    config = checked(*BASE, *OTHER[dotted], *settings)
    section, name = dotted.split(".")
    return config if OTHER[dotted] else replace(config, **{section: replace(getattr(config, section), **{name: True})})


def resume(saved: dict[str, Any], config: Config, **runtime: str) -> None:
    check_fits(saved, config, {"order": "epoch"}, RUNTIME | runtime)


def written_by(config: Config) -> dict[str, Any]:
    return metadata(config, 3, 24, {"order": "epoch"}, RUNTIME)


@pytest.mark.parametrize("dotted", OTHER)
def test_bitwise_refuses_what_rounds_or_drops_otherwise_and_fast_does_not(dotted: str) -> None:
    run, other = checked(*BASE), other_than(dotted)
    with pytest.raises(UserError, match=rf"bitwise.* step 3: .*{dotted} was .* agree to rounding only"):
        resume(written_by(other), run)
    resume(written_by(other), replace(run, run=replace(run.run, determinism="fast")))


ELASTIC = "--run.determinism=elastic"


@pytest.mark.parametrize("dotted", OTHER)
def test_elastic_refuses_what_cuts_sums_within_a_microbatch_and_nothing_else(dotted: str) -> None:
    run, other = checked(*BASE, ELASTIC), other_than(dotted, ELASTIC)
    if dotted not in WITHIN_A_MICROBATCH:
        return resume(written_by(other), run)
    with pytest.raises(UserError, match=rf'"elastic".* step 3: {dotted} was .* agree to rounding only.*"fast"\.$'):
        resume(written_by(other), run)


@pytest.mark.parametrize("was, now", [("bitwise", "elastic"), ("elastic", "bitwise")])
def test_a_run_that_repeats_keeps_its_way_of_repeating(was: str, now: str) -> None:
    saved = written_by(checked(*BASE, f"--run.determinism={was}"))
    with pytest.raises(UserError, match=f"run.determinism was {was} and is now {now}; numbers would agree to rounding only"):
        resume(saved, checked(*BASE, f"--run.determinism={now}"))
    resume(saved, checked(*BASE, "--run.determinism=fast"))


def test_a_fast_run_may_become_elastic_whatever_it_was_on() -> None:
    fast = written_by(checked(*BASE, "--run.determinism=fast", "--training.micro_batch_size=2"))
    elastic = checked(*BASE, ELASTIC)
    resume(fast, elastic, device="cpu (AVX2, threads: 99)")
    assert "from here on" in " ".join(what_becomes_of_numbers(fast, elastic))


@pytest.mark.parametrize("mode, numbers", [("elastic", "the numbers stay the same"), ("fast", "the numbers agree to rounding")])
def test_another_number_of_data_ranks_is_told_with_its_microbatches(mode: str, numbers: str) -> None:
    before, after = (checked("--training.global_batch_size=32", f"--run.determinism={mode}", f"--parallel.dp={dp}") for dp in (4, 2))
    [sentence] = what_becomes_of_numbers(written_by(before), after)
    assert sentence == f"dp was 4 and is now 2: each rank computes 4 of a step's 8 microbatches instead of 2; {numbers}"
    assert what_becomes_of_numbers(written_by(before), before) == []


def test_bitwise_names_the_mode_that_may_change_its_layout() -> None:
    bitwise = "--run.determinism=bitwise"
    with pytest.raises(UserError, match='parallel.dp was 4 and is now 2; .* begins with "elastic" may change this'):
        resume(written_by(checked(bitwise, "--parallel.dp=4")), checked(bitwise, "--parallel.dp=2"))


def test_elastic_refuses_ranks_that_round_differently() -> None:
    for mode in "elastic", "bitwise":
        config = checked(f"--run.determinism={mode}", "--parallel.dp=2")
        require_one_kind(config, {"device": "cpu (AVX2, threads: 1)"})
        with pytest.raises(UserError, match="of one kind") if mode == "elastic" else nullcontext():
            require_one_kind(config, {"device": "NVIDIA A100 + NVIDIA H100"})


def test_elastic_computes_with_one_thread_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for mode, expected in ("fast", 2), ("bitwise", 2), ("elastic", 1):
            choose_arithmetic(checked(f"--run.determinism={mode}", "--parallel.dp=1").run, torch.device("cpu"))
            assert torch.get_num_threads() == expected and torch.are_deterministic_algorithms_enabled() == (mode != "fast")
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def test_only_fast_mode_rounds_products_on_a_gpu_and_nothing_sums_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        for mode, kind, expected in ("fast", "cuda", "high"), ("fast", "cpu", "highest"), ("bitwise", "cuda", "highest"), ("elastic", "cuda", "highest"):
            torch.set_float32_matmul_precision("highest" if expected == "high" else "high")
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
            choose_arithmetic(checked(f"--run.determinism={mode}", "--parallel.dp=1").run, torch.device(kind, 0))
            assert torch.get_float32_matmul_precision() == expected
            assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)


def test_replicas_compare_the_random_state_of_the_device_that_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.Generator(),))
    optimizer = SimpleNamespace(units=[], device=device, specs=list, state_dict=dict)
    mesh = SimpleNamespace(tensor=SimpleNamespace(name="tp", group=None))

    def random_state() -> torch.Tensor:
        ((_, _, alike),) = copies(checked("--parallel.dp=1"), mesh, optimizer)
        return dict(alike)["the random state"]

    before, of_the_cpu = random_state(), torch.get_rng_state()
    seed_masks(device, 7)
    assert not random_state().equal(before) and torch.get_rng_state().equal(of_the_cpu)


def test_every_setting_of_the_layout_is_tried() -> None:
    assert {dotted for dotted in SETTINGS if dotted.startswith("parallel.")} <= set(OTHER)


@pytest.mark.parametrize("name, other", [("torch", "1.0"), ("device", "cpu (AVX2, threads: 99)"), ("device", "NVIDIA H100")])
def test_bitwise_refuses_another_torch_or_device_where_the_checkpoint_tells(name: str, other: str) -> None:
    saved = written_by(checked(*BASE))
    with pytest.raises(UserError, match=f"{name} was .* and is now "):
        resume(saved, checked(*BASE), **{name: other})
    del saved[name]
    resume(saved, checked(*BASE), **{name: other})


def test_bitwise_goes_on_with_settings_that_say_what_is_trained_or_logged() -> None:
    free = ["--optimizer.lr=1e-4", "--training.steps=9", "--logging.every=3", "--training.activation_checkpointing=full"]
    resume(written_by(checked(*BASE)), checked(*BASE, *free))


def test_settings_that_the_mesh_ignores_are_not_compared() -> None:
    idle = ["--parallel.virtual_stages=2", "--parallel.pipeline_schedule=zbv", "--parallel.sequence_parallel=true"]
    idle += ["--parallel.zero_stage=3", "--parallel.dp=1"]
    alone = checked("--run.determinism=bitwise", "--parallel.dp=1")
    resume(written_by(checked("--run.determinism=bitwise", *idle, unchecked=True)), alone)
    resume(written_by(alone), checked("--run.determinism=bitwise", *idle))


def test_a_checkpoint_without_its_config_is_compared_by_its_layout() -> None:
    saved = written_by(checked(*BASE, "--training.micro_batch_size=2"))
    del saved["config"]
    resume(saved, checked(*BASE))
    with pytest.raises(UserError, match="parallel.zero_stage was 0 and is now 1"):
        resume(saved, checked(*BASE, "--parallel.zero_stage=1"))


def test_every_section_either_shapes_the_training_or_does_not() -> None:
    """Bad steps are forgotten where one that does has changed."""
    around = {"run", "parallel", "compile", "checkpoint", "evaluation", "logging"}
    assert set(SHAPE_THE_TRAINING) == set(SECTIONS) - around
