"""The search: what it proposes works and fits, and what it refuses it explains. The time model against the published
world."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from neox_native.config.check import on_device, problems, require
from neox_native.config.load import CONFIGS_FOLDER, load
from neox_native.config.schema import Config, Model, Parallel, Run, Training
from neox_native.errors import UserError, report_user_errors
from neox_native.plan.calibrate import calibrate, to_toml
from neox_native.plan.dry_run import distinct_ranks, dry_run
from neox_native.plan.hardware import Gpu, find_gpu, gpu_of, load_gpus
from neox_native.plan.published import comparisons, table
from neox_native.plan.memory import peak_bytes
from neox_native.plan.search import MEMORY_SHARE, Candidate, layouts, reasons, search
from neox_native.plan.speed import COMPILED, EAGER, Machine, stage_passes, step_time
from tools import plan as tool, show_schedule

ELASTIC = "--run.determinism=elastic"
H100 = Machine(find_gpu("H100"))


@pytest.fixture(scope="module")
def twenty_billion() -> list[Candidate]:
    started = time.process_time()
    found = search(load("configs/20b.toml"), 64, H100)
    assert time.process_time() - started < 60
    return found


def test_every_proposal_can_work_and_fits(twenty_billion: list[Candidate]) -> None:
    fitting = [candidate for candidate in twenty_billion if candidate.time]
    assert fitting == twenty_billion[: len(fitting)]
    for candidate in fitting[:20]:
        assert not problems(candidate.config, 64)
        assert candidate.peak_bytes <= MEMORY_SHARE * H100.gpu.memory_bytes
    speeds = [candidate.speed for candidate in fitting]
    assert speeds == sorted(speeds, reverse=True)


def test_every_choice_that_lost_gets_a_sentence(twenty_billion: list[Candidate]) -> None:
    sentences = reasons(twenty_billion, H100)
    for start in ("activation checkpointing full:", "tp 8:", "pp 16:", "zero 0:", "zero shards inside a node:", "schedule gpipe x1:", "micro batch 1:"):
        assert any(sentence.startswith(start) for sentence in sentences), start
    best = twenty_billion[0].config
    assert not any(sentence.startswith(f"tp {best.parallel.tp}:") for sentence in sentences)


@pytest.mark.slow
def test_the_first_five_stay_under_eighty_gigabytes_in_the_dry_run(twenty_billion: list[Candidate]) -> None:
    for candidate in twenty_billion[:5]:
        for rank in distinct_ranks(candidate.config, 64):
            assert dry_run(candidate.config, rank, 64).peak_bytes < 80e9


def test_the_written_config_is_the_best_layout_and_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "best.toml"
    tool.main(["search", "--config", "configs/pythia/410m.toml", "--gpus", "8", "--gpu", "a100-40", "--write", str(target), ELASTIC])
    printed = capsys.readouterr().out
    config = require(load(target), 8)
    given = load("configs/pythia/410m.toml", [ELASTIC])
    assert (config.model, config.run) == (given.model, given.run)
    assert f"pp {config.parallel.pp} dp {config.parallel.dp} tp {config.parallel.tp}" in printed
    assert "tokens/s/GPU" in printed and "What lost, and why" in printed
    assert peak_bytes(config) <= MEMORY_SHARE * find_gpu("A100-40").memory_bytes


@pytest.mark.parametrize(
    "told, meant",
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("NVIDIA A100-PCIE-40GB", "A100-40"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("AMD Instinct MI250X", "MI250X"),
        ("Quadro", "H100"),
    ],
)
def test_a_drivers_name_means_the_device_of_its_memory(told: str, meant: str) -> None:
    assert gpu_of(told).name == meant


def test_an_unknown_gpu_lists_the_known() -> None:
    with pytest.raises(UserError, match="'V100' is not known; the known are A100-40, A100-80, H100, H200, B200, MI250X"):
        tool.main(["search", "--config", "configs/20b.toml", "--gpus", "64", "--gpu", "V100"])


def test_where_nothing_fits_the_nearest_is_named_with_what_it_lacks() -> None:
    with pytest.raises(
        UserError, match=r"the nearest, pp 1 dp 1 tp 2 .* needs [\d.]+ GiB per GPU, [\d.]+ GiB more than 80% of 39.5 GiB"
    ):
        search(load("configs/20b.toml"), 2, Machine(find_gpu("A100-40")))


def test_where_nothing_divides_the_settings_are_named() -> None:
    with pytest.raises(UserError, match="no layout of 7 GPUs divides"):
        search(replace(load("configs/pythia/70m.toml"), training=Training(global_batch_size=4)), 7, H100)


def test_what_no_layout_mends_is_named() -> None:
    with pytest.raises(UserError, match="^model.num_layers = 0 must be 1 or more.$"):
        search(load("configs/pythia/70m.toml", ["--model.num_layers=0"]), 8, H100)


def test_layouts_that_overlap_tensor_parallelism_cut_the_sequence_and_are_named() -> None:
    found = layouts(load("configs/pythia/70m.toml", ["--parallel.async_tp", "--compile.enabled"]), 2, 8)
    words = {Candidate(layout, 0, None).layout for layout in found}
    assert {"tp 2 sp async" in each for each in words} == {True, False}
    assert all(("tp 2" in each) == ("sp async" in each) == ("async" in each) for each in words)


def test_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="--rank 64 is none of the ranks 0 to 63"):
        tool.main(["dry-run", "--config", "configs/20b.toml", "--world-size", "64", "--rank", "64"])


@pytest.mark.parametrize(
    "option, count",
    [("--top", -1), ("--top", 0), ("--gpus-per-node", 0), ("--gpus", 0), ("--world-size", 0), ("--world-size", -4)],
)
def test_a_number_of_things_is_at_least_one(
    option: str, count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("something ran")

    monkeypatch.setattr(tool, "load", work)
    needed = ["dry-run"] if option == "--world-size" else ["search", "--gpu", "H100", "--gpus", "64"]
    with pytest.raises(SystemExit) as left, report_user_errors():
        tool.main([*needed, "--config", "configs/20b.toml", option, str(count)])
    assert left.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {option} {count} must be a whole number of at least 1; ")


@pytest.mark.parametrize(
    "command",
    [
        ["search", "--config", "configs/20b.toml", "--gpus", "64", "--gpu", "H100"],
        ["calibrate", "--config", "configs/20b.toml", "--like", "H100"],
    ],
    ids=lambda command: command[0],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing" / "x.toml"
    readable_only = Path("/proc/neox_native.toml")
    refused = [(missing, "lies in no folder that exists"), (tmp_path, "is a folder; name a file"), (readable_only, "cannot be written")]
    for target, words in refused:
        started = time.process_time()
        with pytest.raises(UserError, match=f"--write {target} {words}"):
            tool.main([*command, "--write", str(target)])
        assert time.process_time() - started < 1 and not capsys.readouterr().out


def test_a_hardware_file_with_a_gap_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    file.write_text("[X1]\nmemory_bytes = 1e9\n")
    with pytest.raises(UserError, match=r"\[X1\] must have exactly the entries .*peak_flops_per_second"):
        load_gpus(file)
    with pytest.raises(UserError, match="cannot read the hardware file"):
        load_gpus(tmp_path / "none.toml")


def test_held_out_runs_are_predicted_within_six_percent_and_in_order() -> None:
    rows = comparisons()
    held_out = [row for row in rows if not row.calibrates]
    assert sum(abs(row.error) for row in held_out) / len(held_out) < 0.0605
    assert all(abs(row.error) < 0.02 for row in rows if row.calibrates)
    # Runs whose published MFU differ by more than a tenth are ranked as published.
    for one in rows:
        for other in rows:
            if one.published_mfu > 1.1 * other.published_mfu:
                assert one.predicted_mfu > other.predicted_mfu, (one.name, other.name)
    assert "Mean error of the 9 rows held out" in table(rows)


def test_each_cost_makes_the_step_longer() -> None:
    def seconds(machine: Machine = H100, recompute: str = "none", mode: str = "fast", **parallel: object) -> float:
        training = Training(global_batch_size=64, micro_batch_size=2, precision="bf16", activation_checkpointing=recompute)
        model = Model(num_layers=16, hidden_size=2048, num_heads=16)
        config = Config(run=Run(determinism=mode), model=model, training=training, parallel=Parallel(**parallel))
        return step_time(require(config, 16), machine).seconds

    assert seconds(recompute="full") > seconds(recompute="selective") > seconds()
    assert seconds(Machine(H100.gpu, 8, COMPILED)) < seconds(Machine(H100.gpu, 8, EAGER))
    assert seconds(tp=8) > seconds(zero_stage=1)
    assert seconds(tp=8, sequence_parallel=True) > seconds(tp=8, sequence_parallel=True, async_tp=True) > seconds(zero_stage=1)
    assert seconds(mode="elastic", zero_stage=1) > seconds(mode="bitwise", zero_stage=1)
    assert seconds(pp=4) > seconds(pp=4, pipeline_schedule="interleaved_1f1b", virtual_stages=2)
    slow_network = Machine(replace(H100.gpu, network_bytes_per_second=1e9), 8)
    assert seconds(slow_network) > 1.5 * seconds()
    assert seconds(Machine(H100.gpu, gpus_per_node=4), tp=8) > seconds(tp=8)
    # Groups inside a node leave the network one row of gradients a step; they cost more where all links are alike.
    for stage in (1, 2, 3):
        assert seconds(slow_network, zero_stage=stage, zero_shard_size=8) < 0.8 * seconds(slow_network, zero_stage=stage)
        assert seconds(Machine(H100.gpu, 16), zero_stage=stage, zero_shard_size=8) >= seconds(Machine(H100.gpu, 16), zero_stage=stage)


def test_a_machine_can_be_measured(tmp_path: Path) -> None:
    import torch

    config = replace(Config(), model=Model(num_layers=1, hidden_size=64, num_heads=4, seq_length=64))
    measured = calibrate(config, torch.device("cpu"), find_gpu("MI250X"), "this machine")
    file = tmp_path / "machine.toml"
    file.write_text(to_toml(measured))
    loaded = find_gpu("this machine", file)
    assert isinstance(loaded, Gpu) and 0 < loaded.matmul_efficiency < 1
    assert loaded.node_bytes_per_second == find_gpu("MI250X").node_bytes_per_second


HEADERS = [
    (name, line.removeprefix("# Predicted for "), command.removeprefix("#   by python tools/plan.py "))
    for name in ("20b", *(f"pythia/{size}" for size in ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")))
    for lines in [(CONFIGS_FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()[1:]]
    for line, command in zip(lines, lines[1:])
    if line.startswith("# Predicted for ")
]


def test_the_header_of_each_config_says_what_the_planner_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    """A header that is stale wants the line that its command prints."""
    for name, line, command in HEADERS:
        assert f" --config configs/{name}.toml " in command
        tool.main(command.split())
        assert capsys.readouterr().out.strip() == line
    assert len({name for name, *_ in HEADERS}) == 11


def test_a_gpu_is_offered_compiled_code_unless_the_config_or_its_mode_forbids() -> None:
    config = load("configs/pythia/1b.toml")
    offered = {each.config.compile.on for each in search(config, 1, H100)}
    for told in (["--compile.enabled=false"], [ELASTIC]):
        assert {each.config.compile.on for each in search(load("configs/pythia/1b.toml", told), 1, H100)} == {False}
    assert offered == {True} and "compiled" in search(config, 1, H100)[0].layout


def test_schedules_are_drawn_to_scale(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--training.global_batch_size", "256", "--training.activation_checkpointing", "full"]
    arguments = ["--config", "configs/20b.toml", *settings, "--gpu", "H100"]
    config = on_device(require(load("configs/20b.toml", settings), 64), "cuda")
    drawn, unit = show_schedule.to_scale(config, "H100", 8, 8)
    passes = stage_passes(config, H100)
    assert unit == min(stage.forward for stage in passes)
    assert drawn.busy(0) == pytest.approx(8 * (passes[0].forward + passes[0].backward))
    assert drawn.busy(3) == pytest.approx(8 * (passes[3].forward + passes[3].backward))
    # The head, which is not recomputed, changes the last stage's ratio of the two.
    assert passes[3].backward / passes[3].forward < 0.99 * passes[0].backward / passes[0].forward
    for stage, spans in zip(passes, drawn.ranks):
        times = {span.action.kind: span.end - span.start for span in spans}
        assert times == pytest.approx({"F": stage.forward, "B": stage.backward})
    for form in ("text", "svg"):
        show_schedule.main([*arguments, "--format", form])
        assert "predicted on H100" in capsys.readouterr().out
