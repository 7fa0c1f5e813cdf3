"""Closed forms against the dry run, which counts what the code does: volumes equal, memory within 5%."""

from __future__ import annotations

from dataclasses import replace

import pytest

from neox_native.config.check import require
from neox_native.config.load import load
from neox_native.config.schema import Config, Model, Parallel, Run, Training
from neox_native.model.costs import Costs, Kept, Product
from neox_native.model.flops import model_flops_per_token
from neox_native.model.kinds import KINDS
from neox_native.parallel.timeline import timeline
from neox_native.plan import costs
from neox_native.plan.dry_run import dry_run
from neox_native.plan.flight import moments
from neox_native.plan.memory import memory
from neox_native.plan.shares import share_of
from tests.test_extension import TAPS, TOY

# Config, ranks, rank, microbatch, microbatches per step, settings of [parallel], [training], [model] and [run].
Case = tuple[str, int, int, int, int, str]
NO_RECOMPUTATION = "activation_checkpointing=none"
SELECTIVE = "activation_checkpointing=selective"
LOOPED = "virtual_stages=2 pipeline_schedule"
ELASTIC = "determinism=elastic num_layers=2"
SORTS = 'pattern=["attention","attention+feed_forward","feed_forward"]'
FEW: list[Case] = [
    ("70m", 4, 0, 4, 3, "zero_stage=3"),
    ("70m", 4, 0, 4, 3, "zero_stage=2 zero_shard_size=2"),
    ("70m", 4, 0, 4, 3, "tp=4 sequence_parallel=true num_kv_heads=2 vocab_multiple_of=1"),
    ("70m", 4, 2, 4, 4, "pp=2 tie_embeddings=true"),
    ("70m", 4, 2, 4, 4, f"pp=2 tp=2 {SORTS}"),
    ("70m", 4, 0, 8, 2, f"tp=2 sequence_parallel=true parallel_residual=false {SELECTIVE}"),
    *(("70m", 2, 0, 4, 2, f"zero_stage={stage} {ELASTIC}") for stage in (0, 3)),
    ("70m", 8, 4, 4, 4, f"pp=2 tp=2 zero_stage=2 sequence_parallel=true num_kv_heads=1 tie_embeddings=true {ELASTIC}"),
]
MANY: list[Case] = [
    *(("160m", 4, 0, 4, 3, f"zero_stage={stage} determinism=elastic") for stage in (0, 1, 2, 3)),
    ("410m", 8, 6, 4, 8, "pp=4 zero_stage=1 determinism=elastic"),
    ("160m", 8, 2, 2, 4, "pp=4 zero_stage=3 determinism=elastic virtual_stages=3 pipeline_schedule=interleaved_1f1b"),
    ("410m", 8, 4, 2, 4, f"pp=2 tp=2 zero_stage=2 determinism=elastic {LOOPED}=looped_bfs"),
    ("70m", 4, 2, 4, 16, f"pp=2 determinism=elastic {LOOPED}=interleaved_zero_bubble {NO_RECOMPUTATION}"),
    *(("160m", 8, 5, 4, 3, f"zero_stage={stage} zero_shard_size={size}") for stage in (1, 2, 3) for size in (2, 4)),
    ("160m", 16, 8, 2, 4, "pp=2 tp=2 zero_stage=3 zero_shard_size=2 determinism=elastic tie_embeddings=true"),
    ("160m", 16, 0, 2, 4, f"pp=2 zero_stage=1 zero_shard_size=4 {LOOPED}=zbv"),
    ("70m", 4, 0, 4, 3, "tp=2 sequence_parallel=true"),
    ("160m", 16, 0, 4, 3, "tp=4 num_kv_heads=1 zero_stage=2"),
    ("160m", 1, 0, 4, 3, NO_RECOMPUTATION),
    ("160m", 2, 0, 4, 3, "zero_stage=0"),
    ("160m", 4, 0, 4, 3, f"parallel_residual=false {NO_RECOMPUTATION}"),
    ("160m", 4, 0, 8, 3, "zero_stage=2"),
    ("160m", 4, 0, 1, 3, "zero_stage=2 tie_embeddings=true"),
    ("160m", 4, 0, 8, 3, "tp=2 parallel_residual=false"),
    ("160m", 4, 0, 8, 3, f"tp=2 sequence_parallel=true pos_emb=learned {NO_RECOMPUTATION}"),
    ("160m", 4, 0, 8, 3, "tp=2 sequence_parallel=true parallel_residual=false"),
    ("1b", 8, 0, 1, 4, "zero_stage=3 precision=fp32"),
    ("1b", 8, 0, 4, 2, f"tp=8 sequence_parallel=true norm=rmsnorm activation=swiglu {NO_RECOMPUTATION}"),
    ("70m", 4, 0, 4, 4, f"zero_stage=3 {SORTS}"),
    ("70m", 1, 0, 4, 3, f"parallel_residual=false {SORTS} {NO_RECOMPUTATION}"),
    ("160m", 1, 0, 8, 3, SELECTIVE),
    ("160m", 4, 0, 8, 3, f"tp=2 zero_stage=2 {SELECTIVE} recompute_every=2"),
    ("160m", 1, 0, 8, 3, "recompute_every=3"),
    ("160m", 4, 0, 8, 3, f"tp=2 parallel_residual=false norm=rmsnorm activation=swiglu {SELECTIVE}"),
    ("1b", 8, 2, 1, 16, f"pp=4 zero_stage=3 {SELECTIVE}"),
    ("160m", 4, 0, 8, 32, f"pp=4 {LOOPED}=zbv {SELECTIVE} recompute_every=2"),
    ("160m", 8, 0, 8, 8, f"pp=4 tp=2 {LOOPED}=interleaved_zero_bubble precision=fp32 {SELECTIVE}"),
    # One stage per rank: the first, a middle and the last, where a schedule without warmup keeps the logits of all
    # microbatches.
    ("160m", 4, 1, 8, 8, f"pp=4 pipeline_schedule=gpipe {NO_RECOMPUTATION}"),
    ("410m", 4, 2, 4, 16, "pp=2 pipeline_schedule=gpipe precision=fp32"),
    ("70m", 8, 2, 2, 4, "pp=4 zero_stage=2 pipeline_schedule=gpipe"),
    ("1b", 8, 2, 1, 16, f"pp=4 zero_stage=3 {NO_RECOMPUTATION}"),
    ("410m", 16, 4, 4, 8, "pp=4 tp=2 zero_stage=2 norm=rmsnorm activation=swiglu"),
    # Several: stages differ in layers, and each leaves a matrix of gradients behind.
    ("160m", 4, 0, 8, 32, f"pp=4 virtual_stages=3 pipeline_schedule=interleaved_1f1b {NO_RECOMPUTATION}"),
    ("410m", 8, 6, 4, 4, f"pp=4 tp=2 {LOOPED}=interleaved_1f1b {NO_RECOMPUTATION}"),
    ("160m", 8, 2, 2, 4, "pp=4 zero_stage=3 virtual_stages=3 pipeline_schedule=interleaved_1f1b"),
    ("410m", 4, 0, 1, 8, "pp=2 zero_stage=2 virtual_stages=2 pipeline_schedule=interleaved_1f1b pos_emb=learned"),
    ("1b", 8, 0, 2, 16, f"tp=2 pp=4 {LOOPED}=looped_bfs pos_emb=none precision=fp32"),
    ("70m", 4, 0, 2, 16, f"pp=2 zero_stage=2 {LOOPED}=looped_bfs parallel_residual=false"),
    ("410m", 8, 4, 2, 4, f"pp=2 tp=2 zero_stage=2 {LOOPED}=looped_bfs"),
    ("160m", 8, 7, 1, 4, f"pp=4 zero_stage=3 {LOOPED}=looped_bfs {NO_RECOMPUTATION}"),
    # Backward passes in two halves.
    ("160m", 4, 0, 8, 32, f"pp=4 {LOOPED}=zbv {NO_RECOMPUTATION}"),
    ("160m", 8, 0, 8, 8, f"pp=4 tp=2 {LOOPED}=zbv parallel_residual=false precision=fp32 {NO_RECOMPUTATION}"),
    ("160m", 4, 3, 2, 8, f"pp=4 {LOOPED}=zbv {NO_RECOMPUTATION}"),
    ("160m", 4, 0, 8, 32, f"pp=4 {LOOPED}=interleaved_zero_bubble {NO_RECOMPUTATION}"),
    ("70m", 4, 2, 4, 16, f"pp=2 {LOOPED}=interleaved_zero_bubble {NO_RECOMPUTATION}"),
    ("1b", 8, 0, 8, 2, f"pp=2 tp=4 sequence_parallel=true {LOOPED}=interleaved_zero_bubble {NO_RECOMPUTATION}"),
]


def resolved(name: str, ranks: int, micro: int, microbatches: int, settings: str) -> Config:
    """The config of a case."""
    sections = {"parallel": Parallel, "training": Training, "model": Model, "run": Run}
    overrides = [f"--training.micro_batch_size={micro}"]
    split = 1
    for setting in settings.split():
        field, value = setting.split("=")
        (section,) = (name for name, kind in sections.items() if field in kind.__dataclass_fields__)
        overrides.append(f"--{section}.{setting}")
        split *= int(value) if field in ("pp", "tp") else 1
    overrides.append(f"--training.global_batch_size={micro * microbatches * ranks // split}")
    return require(load(f"configs/pythia/{name}.toml", overrides), ranks)


def hold(name: str, ranks: int, rank: int, micro: int, microbatches: int, settings: str) -> None:
    """Assert that the closed forms of a layout are what the dry run counts."""
    config = resolved(name, ranks, micro, microbatches, settings)
    report = dry_run(config, rank, ranks)
    stage = report.coordinates["pp"]
    assert share_of(config, stage).parameters == report.parameters
    assert costs.traffic(config, stage) == {axis: sent["bytes"] for axis, sent in report.communication.items()}
    assert costs.point_to_point_bytes(config, stage) == report.point_to_point_bytes
    predicted = memory(config, stage)
    assert abs(sum(predicted.values()) / report.peak_bytes - 1) < 0.05, (predicted, report.bytes_by_kind)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_closed_forms_are_what_the_code_does(case: Case) -> None:
    hold(*case)


def test_closed_forms_read_the_costs_of_a_kind_that_only_a_test_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_moving_average(model: Model) -> Costs:
        h, cut = model.hidden_size, ("projected", "projected, padded", "averaged")
        return Costs(
            products=(Product(h, h, cut="columns"), Product(h, h, cut="inner")),
            kept=(Kept("softmax of the input", h, cut=False), *(Kept(name, h) for name in cut)),
            flops=2 * TAPS * h,
            model_flops=6 * TAPS * h,
        )

    monkeypatch.setitem(KINDS, TOY.name, replace(TOY, costs=of_moving_average))
    hold("70m", 1, 0, 32, 2, f'pattern=["attention+feed_forward","{TOY.name}"] vocab_size=512 {NO_RECOMPUTATION}')


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_closed_forms_are_what_the_code_does_on_a_wide_grid(case: Case) -> None:
    hold(*case)


def in_flight(parallel: Parallel, num_microbatches: int, pp_rank: int) -> int:
    """(stage, microbatch) pairs whose activations a rank holds at most."""
    return max(sum(moment.held) for moment in moments(parallel, num_microbatches, pp_rank))


@pytest.mark.parametrize("schedule, virtual", [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 3), ("looped_bfs", 2)])
@pytest.mark.parametrize("pp, microbatches", [(2, 8), (4, 8), (4, 16)])
def test_bubble_and_microbatches_in_flight_are_those_of_the_schedule(
    schedule: str, virtual: int, pp: int, microbatches: int
) -> None:
    parallel = Parallel(pp=pp, dp=1, pipeline_schedule=schedule, virtual_stages=virtual)
    drawn = timeline(schedule, pp, virtual, microbatches)
    assert costs.bubble_fraction(parallel, microbatches) == pytest.approx(drawn.bubble_fraction)
    peaks = [drawn.peak_in_flight(rank) for rank in range(pp)]
    assert [in_flight(parallel, microbatches, rank) for rank in range(pp)] == peaks


@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv"])
def test_split_backward_passes_leave_a_third_of_the_bubble(schedule: str) -> None:
    parallel = Parallel(pp=4, dp=1, pipeline_schedule=schedule, virtual_stages=2)
    drawn = timeline(schedule, 4, 2, 16)
    assert costs.bubble_fraction(parallel, 16) == pytest.approx(drawn.bubble_fraction)
    assert in_flight(parallel, 16, 0) == drawn.peak_in_flight(0)


@pytest.mark.parametrize("settings", ["selective", "full recompute_every=2", "full parallel_residual=false tp=2"])
def test_what_is_recomputed_is_what_the_dry_run_counts_more(settings: str) -> None:
    config = resolved("70m", 2, 4, 3, f"activation_checkpointing={settings} precision=fp32")
    plain = replace(config, training=replace(config.training, activation_checkpointing="none"))
    more, fewer = (dry_run(each, 0, 2).hardware_flops for each in (config, plain))
    assert costs.recomputed_flops(config, 0) == more - fewer


def test_flops_are_those_of_the_model_without_recomputation() -> None:
    config = require(
        load("configs/pythia/70m.toml", ["--training.global_batch_size", "64", "--training.micro_batch_size", "4"]), 1
    )
    parts = [costs.model_flops_of_rank(require(load("configs/20b.toml"), 64), stage) for stage in range(4)]
    tokens = 64 * config.model.seq_length
    assert costs.model_flops_of_rank(config, 0) == tokens * model_flops_per_token(config.model)
    whole = load("configs/20b.toml")
    assert sum(parts) * 8 * 2 == pytest.approx(1536 * 2048 * model_flops_per_token(whole.model), rel=1e-6)
