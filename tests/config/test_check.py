"""What cannot work is refused with its numbers and a way out, and what can work is not."""

from __future__ import annotations

import pytest

from neox_native.config.check import (
    FIXED_ELSEWHERE,
    FREE_WITHIN,
    incompatible,
    notices,
    problems,
    require,
)
from neox_native.config.layout_rules import IDLE_AT_1
from neox_native.config.load import CONFIGS_FOLDER, load
from neox_native.config.schema import Parallel
from neox_native.config.settings import SETTINGS
from neox_native.errors import UserError

QUICKSTART = CONFIGS_FOLDER / "quickstart.toml"
PIPELINE = ["--parallel.pp=2"]
LOOPED = [*PIPELINE, "--parallel.virtual_stages=2"]
IN_GROUPS = ["--parallel.zero_stage=3", "--parallel.zero_shard_size"]
ZERO_BUBBLE = [*LOOPED, "--parallel.pipeline_schedule=interleaved_zero_bubble"]


def sentences(overrides: list[str], world_size: int = 1) -> list[str]:
    return problems(load(QUICKSTART, overrides), world_size)


def test_the_quickstart_fits_every_mesh_of_up_to_8_ranks() -> None:
    for pp in (1, 2, 4):
        for tp in (1, 2, 4, 8):
            for dp in (1, 2, 4, 8):
                if pp * dp * tp <= 8:
                    layout = [f"--parallel.pp={pp}", f"--parallel.dp={dp}", f"--parallel.tp={tp}"]
                    assert sentences([*layout, "--parallel.sequence_parallel"], pp * dp * tp) == []


MODEL_MISTAKES = [
    (
        ["--model.num_heads=6"],
        "model.num_heads = 6 does not divide model.hidden_size = 128; the nearest head counts that do are 4 and 8.",
    ),
    (
        ["--model.num_kv_heads=3"],
        "model.num_kv_heads = 3 does not divide model.num_heads = 8; the nearest that do are 2 and 4.",
    ),
    (
        ["--model.rotary_pct=0.1"],
        "model.rotary_pct = 0.1 of a head of 16 channels turns 1 of them, "
        "but rotary embedding needs an even number above 0: 0.125 turns 2; ",
    ),
    (
        ["--model.rotary_pct=0.7"],
        "turns 11 of them, but rotary embedding needs an even number above 0: 0.625 turns 10; ",
    ),
    (
        ["--model.hidden_size=9", "--model.num_heads=1", "--model.pos_emb=sinusoidal"],
        'model.pos_emb = "sinusoidal" needs an even model.hidden_size, but it is 9.',
    ),
]
DATA_MISTAKES = [
    (["--data.train="], "data.train is empty"),
    (
        ['--data.train=[{path = "a", weight = 0}]'],
        'data.train[0] = {path = "a", weight = 0} must have a path and a weight above 0',
    ),
    (['--data.valid=[{path = "a", weight = 1}, {weight = 1}]'], "data.valid[1] = {weight = 1} must have a path"),
    (['--data.valid=[{path = "a", weight = 1, labels = 3}]'], "its labels, if it has any, are a path too"),
    (['--data.train=[{path = "a", wieght = 1}]'], 'data.train[0] = {path = "a", wieght = 1} has a key'),
]
OPTIMISATION_MISTAKES = [
    (["--lr_schedule.min_lr=0.01"], "lr_schedule.min_lr = 0.01 is above the peak, optimizer.lr = 0.006"),
    (
        ["--lr_schedule.kind=wsd", "--lr_schedule.cooldown_fraction=0.97"],
        "lr_schedule.warmup_fraction(0.05) + cooldown_fraction(0.97) = 1.02 is more than the whole schedule",
    ),
    (["--optimizer.betas=[0.9]"], "optimizer.betas = [0.9] has 1 numbers, but AdamW takes 2"),
    (
        ["--training.min_loss_scale=8192"],
        "training.initial_loss_scale = 4096.0 is below training.min_loss_scale = 8192.0",
    ),
    (["--run.dir="], "run.dir is empty"),
    *(
        ([f"--run.profile={asked}"], f'run.profile = "{asked}" must be FIRST:END, such as "10:13" for steps 10, 11 and 12')
        for asked in ("10", "10-13", "13:10", "10:10", "0:3", "-1:3", "a:b", "1:2:3", ":3")
    ),
    (["--run.profile=300:303"], 'run.profile = "300:303" begins after the last step, training.steps = 200'),
    (["--checkpoint.save_steps=sometimes"], 'checkpoint.save_steps = "sometimes" must be "pythia" or a list of steps'),
    (["--checkpoint.resume="], "checkpoint.resume is empty"),
    (
        ["--training.activation_checkpointing=selective", "--compile.enabled", "--model.hidden_dropout=0.1"],
        "would draw other dropout masks in the backward pass, where model.hidden_dropout = 0.1 and",
    ),
    (
        ["--training.activation_checkpointing=full", "--training.recompute_every=99"],
        "training.recompute_every = 99 recomputes none of the model.num_layers = ",
    ),
    (
        ["--run.determinism=bitwise", "--compile.enabled"],
        'run.determinism = "bitwise" cannot hold with compile.enabled = true',
    ),
    (
        ["--run.determinism=elastic", "--compile.enabled"],
        'run.determinism = "elastic" cannot hold with compile.enabled = true',
    ),
]


@pytest.mark.parametrize("overrides, part", MODEL_MISTAKES + DATA_MISTAKES + OPTIMISATION_MISTAKES)
def test_each_mistake_gets_its_own_sentence(overrides: list[str], part: str) -> None:
    found = sentences(overrides)
    assert len(found) == 1 and part in found[0] and found[0].endswith("."), found


ASYNC_TP = ["--parallel.tp=2", "--parallel.sequence_parallel", "--parallel.async_tp"]
LAYOUT_MISTAKES = [
    (
        4,
        ["--parallel.pp=2", "--parallel.dp=2", "--parallel.tp=2"],
        "pp(2) * dp(2) * tp(2) = 8 ranks, but torchrun started 4; start 8 (torchrun's --nnodes times --nproc-per-node)"
        ", or set parallel.dp = 1, or -1, which takes the ranks there are.",
    ),
    (4, ["--parallel.tp=8", "--parallel.dp=2"], "pp(1) * dp(2) * tp(8) = 16 ranks, but torchrun started 4; start 16"),
    (8, ["--parallel.pp=3"], "pp(3) * tp(1) = 3 does not divide the ranks: torchrun started 8; start a multiple of 3"),
    (
        2,
        ["--training.global_batch_size=30"],
        "global_batch_size = 30 is no multiple of micro_batch_size(4) * dp(2) = 8; the nearest that are: 24 and 32.",
    ),
    (
        3,
        ["--training.global_batch_size=32"],
        "micro_batch_size(4) * dp(3) = 12; the nearest that are: 24 and 36; for this batch, take 2 or 4 ranks.",
    ),
    (
        6,
        ["--training.global_batch_size=32", "--parallel.pp=2"],
        "micro_batch_size(4) * dp(3) = 12; the nearest that are: 24 and 36; for this batch, take 4 or 8 ranks.",
    ),
    (2, ["--training.global_batch_size=3"], "micro_batch_size(4) * dp(2) = 8; the nearest that are: 8."),
    (
        3,
        [
            "--parallel.tp=3",
            "--model.hidden_size=96",
            "--model.num_heads=12",
            "--model.vocab_multiple_of=3",
            "--model.ffn_hidden_size=256",
        ],
        "parallel.tp = 3 does not divide model.ffn_hidden_size = 256; set parallel.tp to a divisor of 256.",
    ),
    (4, ["--parallel.tp=4", "--model.num_heads=2"], "parallel.tp = 4 does not divide model.num_heads = 2"),
    (
        4,
        ["--parallel.tp=4", "--model.hidden_size=96", "--model.num_heads=24", "--model.num_kv_heads=6"],
        "parallel.tp = 4 neither divides model.num_kv_heads = 6 nor is a multiple of it; the nearest degrees that are one of "
        "the two are 3 and 6.",
    ),
    (
        4,
        ["--parallel.tp=4", "--model.vocab_size=6", "--model.vocab_multiple_of=1"],
        "the padded vocabulary = 6 leaves a rank of parallel.tp = 4 without a row; lower parallel.tp or raise "
        "model.vocab_multiple_of (now 1).",
    ),
    (
        2,
        ["--parallel.tp=2", "--parallel.sequence_parallel", "--model.seq_length=127"],
        "parallel.tp = 2 does not divide model.seq_length = 127; set parallel.tp to a divisor of 127, "
        "or parallel.sequence_parallel = false.",
    ),
    (
        2,
        [*PIPELINE, "--parallel.virtual_stages=2"],
        'parallel.pipeline_schedule = "1f1b" runs 1 stage per rank, but parallel.virtual_stages = 2',
    ),
    (
        2,
        [*PIPELINE, "--parallel.pipeline_schedule=zbv"],
        'parallel.pipeline_schedule = "zbv" runs exactly 2 stages per rank, but parallel.virtual_stages = 1',
    ),
    (8, ["--parallel.pp=8"], "model.num_layers = 4 cannot fill pp(8) * virtual_stages(1) = 8 stages"),
    (
        2,
        [*PIPELINE, "--parallel.stage_layers=[1, 2]"],
        "stage_layers = [1, 2] has 2 stages and 3 layers, but pp(2) * virtual_stages(1) = 2 and model.num_layers = 4",
    ),
    (
        2,
        [*PIPELINE, "--parallel.stage_layers=[2, 1, 1]"],
        "parallel.stage_layers = [2, 1, 1] has 3 stages and 4 layers",
    ),
    (
        4,
        ["--parallel.pp=4", "--training.micro_batch_size=16"],
        "but global_batch_size(32) / (micro_batch_size(16) * dp(1)) = 2 and parallel.pp = 4; ",
    ),
    (
        2,
        [*LOOPED, "--parallel.pipeline_schedule=interleaved_1f1b", "--training.global_batch_size=20"],
        "runs its microbatches in 2 equal rounds, but global_batch_size(20) / (micro_batch_size(4) * dp(1)) = 5; "
        "make them a multiple of parallel.pp = 2, such as 4 or 6",
    ),
    (2, [*ZERO_BUBBLE, "--compile.enabled"], "splits the backward pass, which compile.enabled = true cannot"),
    (4, [*IN_GROUPS, "3"], "zero_shard_size = 3 does not divide the 4 data-parallel ranks; set it to 2 or 4, or to 0, which shards"),
    (4, [*IN_GROUPS, "8"], "parallel.zero_shard_size = 8 is larger than the 4 data-parallel ranks; set it to 4, or to 0,"),
    (2, ["--parallel.tp=2", "--parallel.async_tp"], "cuts the all-gathers and reduce-scatters of sequence parallelism in pieces"),
    (2, [*ASYNC_TP, "--compile.enabled=false"], "parallel.async_tp = true is done by torch's compiler, but compile.enabled = false"),
    (4, [*ZERO_BUBBLE, "--parallel.zero_stage=2"], "parallel.zero_stage = 2 would reduce them there; set it to 0 or 1"),
]


@pytest.mark.parametrize("world_size, overrides, part", LAYOUT_MISTAKES)
def test_each_layout_mistake_gets_its_own_sentence(world_size: int, overrides: list[str], part: str) -> None:
    found = sentences(overrides, world_size)
    assert len(found) == 1 and part in found[0] and found[0].endswith("."), found


IGNORED = {
    "pp": {"pipeline_schedule": ["zbv", "interleaved_1f1b"], "virtual_stages": ["9"], "stage_layers": ["[1, 1]", "[2, 2]"]},
    "dp": {"zero_stage": ["1", "3"], "zero_shard_size": ["2"]},
    "tp": {"sequence_parallel": ["true"], "async_tp": ["true"]},
}


@pytest.mark.parametrize(
    "axis, setting, value",
    [(axis, setting, value) for axis, names in IGNORED.items() for setting, values in names.items() for value in values],
)
def test_a_setting_of_an_axis_of_degree_1_leaves_the_resolved_config_as_it_is(axis: str, setting: str, value: str) -> None:
    assert {axis: tuple(settings) for axis, settings in IGNORED.items()} == IDLE_AT_1
    others = {"pp": 2, "dp": 2, "tp": 2} | {axis: 1}
    mesh = [f"--parallel.{name}={degree}" for name, degree in others.items() if name != "dp"]  # dp is left to resolve
    plain = [*mesh, "--training.activation_checkpointing=full", *(["--model.seq_length=127"] if axis == "tp" else [])]
    override = f"--parallel.{setting}={value}"
    assert require(load(QUICKSTART, [*plain, override]), 4) == require(load(QUICKSTART, plain), 4)


NUMBERS = sorted(s.dotted for s in SETTINGS.values() if s.annotation in (int, float))


@pytest.mark.parametrize("dotted", NUMBERS)
@pytest.mark.parametrize("bad", ["-3", "nan"])
def test_every_number_refuses_what_is_no_size(dotted: str, bad: str) -> None:
    if SETTINGS[dotted].annotation is int and bad == "nan":
        return
    (sentence,) = sentences([f"--{dotted}={bad}"])
    assert sentence.startswith(f"{dotted} = {SETTINGS[dotted].annotation(bad)} must be")


@pytest.mark.parametrize(
    "override, part",
    [
        ("--model.num_layers=0", "model.num_layers = 0 must be 1 or more."),
        ("--training.spike_window=0", "training.spike_window = 0 must be 1 or more."),
        ("--parallel.dp=0", "parallel.dp = 0 must be 1 or more, or -1 for the ranks that pp and tp leave."),
        ("--parallel.zero_stage=4", "parallel.zero_stage = 4 must be between 0 and 3."),
        ("--parallel.zero_shard_size=1", "parallel.zero_shard_size = 1 must be 0 or at least 2."),
        ("--lr_schedule.warmup_fraction=1.5", "lr_schedule.warmup_fraction = 1.5 must be between 0 and 1."),
        ("--model.hidden_dropout=1", "model.hidden_dropout = 1.0 must be at least 0 and below 1."),
        ("--optimizer.betas=[0.9, 1]", "optimizer.betas = [0.9, 1.0] must be at least 0 and below 1."),
        ("--parallel.stage_layers=[4, 0]", "parallel.stage_layers = [4, 0] must be 1 or more."),
        ("--checkpoint.save_steps=[-1]", "checkpoint.save_steps = [-1] must be 0 or more and finite."),
        (f"--training.steps={10**30}", f"training.steps = {hex(10**30)} must be 9,223,372,036,854,775,807 or less."),
        ("--training.clip_grad_norm=inf", "training.clip_grad_norm = inf must be 0 or more and finite."),
        ("--optimizer.eps=0", "optimizer.eps = 0.0 must be above 0 and finite."),
    ],
)
def test_a_number_out_of_range_is_refused_alone(override: str, part: str) -> None:
    assert sentences([override, "--model.num_heads=6"]) == [part]


def test_require_raises_all_sentences_at_once() -> None:
    with pytest.raises(UserError) as error:
        require(load(QUICKSTART, ["--model.num_heads=6", "--training.global_batch_size=30"]), 2)
    assert len(str(error.value).splitlines()) == 2


def test_require_returns_the_config_with_dp_resolved() -> None:
    config = load(QUICKSTART, ["--parallel.tp=2", "--parallel.pp=2"])
    assert require(config, 8).parallel == Parallel(pp=2, dp=2, tp=2)
    with pytest.raises(UserError, match="does not divide the ranks: torchrun started 2"):
        require(config, 2)


def test_groups_of_all_ranks_or_of_nothing_to_shard_are_no_groups() -> None:
    plain = ["--parallel.tp=1", "--parallel.dp=4"]
    for stage, size in ((3, 4), (0, 2)):
        same = [*plain, f"--parallel.zero_stage={stage}"]
        assert require(load(QUICKSTART, [*same, f"--parallel.zero_shard_size={size}"]), 4) == require(load(QUICKSTART, same), 4)
    assert require(load(QUICKSTART, [*plain, *IN_GROUPS, "2"]), 4).parallel.shard_ranks == 2


def test_slow_choices_say_their_number() -> None:
    assert notices(load(QUICKSTART), 2, "cpu") == []
    (fp16,) = notices(load(QUICKSTART, ["--training.precision=fp16"]), 2, "cpu")
    assert "1 GFLOP/s" in fp16
    assert notices(load(QUICKSTART, ["--training.precision=fp16"]), 2, "cuda") == []
    assert "1 thread a rank" in " ".join(notices(load(QUICKSTART, ["--run.determinism=elastic"]), 2, "cpu"))
    for stage, volume in ((2, "moves 5 times"), (3, "moves up to 12 times")):
        (zero,) = notices(load(QUICKSTART, [f"--parallel.zero_stage={stage}"]), 2, "cpu")
        assert "4 microbatches" in zero and volume in zero
    assert notices(load(QUICKSTART, ["--parallel.zero_stage=3"]), 1, "cpu") == []
    (zero,) = notices(load(QUICKSTART, [*IN_GROUPS, "2"]), 4, "cpu")
    assert "moves up to 6 times the parameters per step inside groups of 2 ranks, where" in zero


def test_a_resumed_run_keeps_its_model_and_its_data_order() -> None:
    old = load(QUICKSTART)
    (sentence,) = incompatible(old, load(QUICKSTART, ["--model.hidden_size=256"]))
    assert "model.hidden_size is 256, but the checkpoint was trained with 128" in sentence
    changed = [
        "--run.seed=1",
        "--data.split=9,1,0",
        "--optimizer.name=sgd",
        "--model.tie_embeddings",
        "--model.norm=rmsnorm",
    ]
    assert len(incompatible(old, load(QUICKSTART, changed))) == 5
    assert {*FIXED_ELSEWHERE, *FREE_WITHIN} <= set(SETTINGS)


def test_a_resumed_run_may_change_its_layout_and_its_length() -> None:
    free = [
        "--parallel.tp=2",
        "--parallel.pp=2",
        "--parallel.zero_stage=3",
        "--training.steps=9",
        "--optimizer.lr=1e-4",
        "--logging.every=1",
        "--training.precision=bf16",
        "--training.global_batch_size=64",
        "--compile.enabled",
        "--checkpoint.save_every=3",
        "--evaluation.every=2",
        "--data.train=data/moved",
        "--run.dir=runs/moved",
        "--model.hidden_dropout=0.1",
        "--model.init_std=0.1",
        "--training.micro_batch_size=2",
    ]
    assert incompatible(load(QUICKSTART), load(QUICKSTART, free)) == []
