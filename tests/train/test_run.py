"""Whole runs, from settings to metrics and checkpoints, on forked ranks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train as entry
from neox_native.checkpoint import store
from neox_native.config.check import require
from neox_native.config.load import dump, load
from neox_native.config.schema import Config
from neox_native.data.indexed import IndexedWriter
from neox_native.engine.step import TrainStep
from neox_native.errors import UserError
from neox_native.interop.checkpoints import CheckpointReader
from neox_native.launch import Ranks
from neox_native.model import initialize
from neox_native.model.transformer import cards
from neox_native.train.folder import RunFolder
from neox_native.train.state import RunState
from tests.ranks import RankError, run_ranks
from tools import show_batch

CPU = torch.device("cpu")
BASE = [
    "--model.num_layers=4", "--model.hidden_size=32", "--model.num_heads=4", "--model.seq_length=16",
    "--model.vocab_size=60", "--model.vocab_multiple_of=4", "--training.steps=20", "--training.global_batch_size=8",
    "--training.micro_batch_size=1", "--optimizer.lr=1e-2", "--logging.every=1", "--logging.tensorboard=false",
    "--run.determinism=bitwise", "--run.device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """A prefix of a small token file with a structure to learn."""
    prefix = str(tmp_path_factory.mktemp("data") / "corpus")
    random = np.random.RandomState(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(40):
            start = random.randint(60)
            writer.add_document((start + np.arange(random.randint(50, 200)) * random.randint(1, 3)) % 60)
    return prefix


def settings(corpus: str, folder: Path, *overrides: str) -> Config:
    return load(None, [*BASE, f"--data.train={corpus}", f"--run.dir={folder}", *overrides])


def run(config: Config, stop_after: int | None = None) -> list[dict]:
    """Train on as many ranks as the config needs; with `stop_after`, die there. Returns what was logged."""
    world_size = config.parallel.pp * max(config.parallel.dp, 1) * config.parallel.tp

    def train() -> None:
        if stop_after is not None:
            step = TrainStep.__call__

            def dying(self, batch, rate):
                assert batch.consumed_samples <= stop_after * config.training.global_batch_size, "killed here"
                return step(self, batch, rate)

            TrainStep.__call__ = dying
        entry.train(require(config, world_size), CPU)

    if stop_after is None:
        run_ranks(world_size, train)
    else:
        with pytest.raises(RankError, match="killed here"):
            run_ranks(world_size, train)
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(metrics: list[dict], *names: str) -> list[tuple]:
    return [tuple(line[name] for name in ("step", *names)) for line in metrics]


DROPOUT = ["--model.hidden_dropout=0.2", "--model.attention_dropout=0.2"]


@pytest.mark.parametrize(
    "layout", [["--parallel.dp=2"], ["--parallel.dp=2", "--parallel.zero_stage=3", *DROPOUT]], ids=["stage 0", "stage 3 and dropout"]
)
def test_a_killed_and_resumed_run_logs_bitwise_what_an_undisturbed_one_does(corpus, tmp_path, layout):
    whole = run(settings(corpus, tmp_path / "whole", *layout))
    broken = settings(corpus, tmp_path / "broken", *layout, "--checkpoint.save_every=10")
    run(broken, stop_after=13)
    resumed = run(replace(broken, training=replace(broken.training, activation_checkpointing="full")))  # repeats what it forgot
    names = ("loss", "grad_norm", "batch_hash", "learning_rate", "consumed_samples")
    assert curve(resumed, *names) == curve(whole, *names)
    assert [line["step"] for line in resumed] == list(range(1, 21))
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.5


def test_an_overflow_in_fp16_takes_no_learning_rate_before_and_after_a_resume(corpus, tmp_path):
    low = ["--parallel.dp=1", "--training.precision=fp16", "--training.initial_loss_scale=1e6", "--training.loss_scale_window=3"]
    low += ["--lr_schedule.warmup_fraction=0.5", "--training.steps=12"]
    whole = run(settings(corpus, tmp_path / "whole", *low))
    broken = settings(corpus, tmp_path / "broken", *low, "--checkpoint.save_every=6")
    run(broken, stop_after=8)
    assert curve(run(broken), "loss", "learning_rate") == curve(whole, "loss", "learning_rate")
    updates = 0
    for line in whole:
        assert line["learning_rate"] == pytest.approx(1e-2 * updates / 6)
        updates += line["grad_norm"] is not None
    assert 2 <= updates <= 6, "too few or too many overflows to show anything"


def test_a_run_continues_in_any_other_layout(corpus, tmp_path):
    fast = "--run.determinism=fast"
    looped = ["--parallel.virtual_stages=2", "--parallel.pipeline_schedule=interleaved_1f1b", "--parallel.stage_layers=[1,1,1,1]"]
    whole = run(settings(corpus, tmp_path / "whole", "--parallel.dp=1", fast))
    layouts = [
        ["--parallel.dp=2", "--parallel.tp=2", "--parallel.zero_stage=1", "--parallel.sequence_parallel=true"],
        ["--parallel.dp=4", "--parallel.zero_stage=3"],
        ["--parallel.pp=2", "--parallel.dp=1", *looped],
        ["--parallel.dp=1", *looped],  # ignored by one stage, which has all layers
    ]
    for number, layout in enumerate(layouts, start=1):
        stop = 5 * number if number < len(layouts) else None
        config = settings(corpus, tmp_path / "moving", *layout, fast, "--checkpoint.save_every=5")
        moved = run(config, stop_after=stop)
    for (step, loss, norm, digest), expected in zip(
        curve(moved, "loss", "grad_norm", "batch_hash"), curve(whole, "loss", "grad_norm", "batch_hash"), strict=True
    ):
        assert (step, digest) == (expected[0], expected[3])
        assert (loss, norm) == pytest.approx(expected[1:3], rel=1e-4)


def test_replicas_drop_alike_after_each_change_of_layout(corpus, tmp_path, monkeypatch):
    """Each layout goes on where the one before ended, and compares weights and random states of its replicas every step."""
    layouts = [
        ["--parallel.dp=1"],
        ["--parallel.dp=1", "--parallel.tp=2"],
        ["--parallel.dp=1", "--parallel.tp=4", "--parallel.zero_stage=1"],
        ["--parallel.dp=2", "--parallel.tp=2", "--training.micro_batch_size=2"],
        ["--parallel.pp=2", "--parallel.dp=1", "--parallel.tp=2", "--training.activation_checkpointing=full"],
    ]
    for number, layout in enumerate(layouts, start=1):
        common = ["--run.check_replicas_every=1", "--run.determinism=fast", f"--training.steps={number}"]
        with monkeypatch.context() as patched:
            if number == 1:  # a checkpoint with a random state, as earlier versions wrote them
                tensors = RunState.tensors
                patched.setattr(RunState, "tensors", lambda self: tensors(self) | {"rng.cpu.pp0.dp0.tp0": torch.get_rng_state()})
            metrics = run(settings(corpus, tmp_path, *layout, *common, *DROPOUT))
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]


def test_a_run_goes_on_with_a_smaller_batch_and_with_more_steps(corpus, tmp_path, capsys):
    mixture = f'--data.train=[{{path = "{corpus}", weight = 1.0}}, {{path = "{corpus}", weight = 2.0}}]'
    common = ["--parallel.dp=1", "--run.determinism=fast", "--data.packing=unpacked", mixture]
    run(settings(corpus, tmp_path, *common, "--training.steps=4"))
    smaller = settings(corpus, tmp_path, *common, "--training.steps=7", "--training.global_batch_size=4")
    consumed = [line["consumed_samples"] for line in run(smaller)]
    assert consumed == [8, 16, 24, 32, 36, 40, 44]
    more = settings(corpus, tmp_path, *common, "--training.steps=30", "--training.global_batch_size=4")
    logged = {line["step"]: line["batch_hash"] for line in run(more)}
    assert len(logged) == 30
    tmp_path.joinpath("more.toml").write_text(dump(more))
    checkpoint = str(tmp_path / "checkpoints" / "step_000000007")
    show_batch.main(["--config", str(tmp_path / "more.toml"), "--checkpoint", checkpoint, "--hash", "8:30", "--json"])
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["step"]: line["batch_hash"] for line in shown} == {step: logged[step] for step in range(8, 31)}


def test_a_run_that_a_checkpoint_does_not_fit_is_refused_before_a_tensor_is_read(corpus, tmp_path, monkeypatch):
    run(settings(corpus, tmp_path, "--parallel.dp=1", "--checkpoint.save_every=5"), stop_after=6)
    monkeypatch.setattr(store, "load", lambda *_, **__: pytest.fail("a tensor was read"))
    for changes, sentence in [
        (["--parallel.dp=2"], "agree to rounding only"),
        (["--parallel.dp=1", "--data.split=50,50,0"], "data.split is"),
        (["--parallel.dp=1", "--model.hidden_size=64"], "model.hidden_size is 64, but the checkpoint was trained with"),
    ]:
        with pytest.raises(RankError, match=sentence):
            run(settings(corpus, tmp_path, *changes))


MISTAKES = [
    ["--data.train=nowhere"], ["--checkpoint.resume=nowhere"], ["--checkpoint.resume=none", "--checkpoint.initialize_from=nowhere"],
    ["--checkpoint.resume=none", "--data.train=nowhere"], ["--model.vocab_size=40"], ["--checkpoint.resume=none", "--model.vocab_size=40"],
    ["--parallel.tp=3"], ["--data.split=0,1,0"], ["--evaluation.every=1", "--data.split=1,0,0"], ["--run.seed=-1"],
]  # fmt: skip


def tree(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_refused_command_makes_nothing(corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    board = "--logging.tensorboard=true"

    def refused() -> None:
        for mistake in MISTAKES:
            for folder in tmp_path / "empty", tmp_path / "new" / "run":
                with pytest.raises(UserError):
                    entry.train(require(settings(corpus, folder, "--parallel.dp=1", board, *mistake), 1), CPU)
                assert tree(tmp_path) == {tmp_path / "empty": None}, mistake

    run_ranks(1, refused)


def test_a_refused_command_leaves_the_run_as_it_was(corpus, tmp_path):
    config = settings(corpus, tmp_path, "--parallel.dp=1", "--training.steps=2")
    run(config)
    before = tree(tmp_path)
    for mistake in [*MISTAKES, ["--model.num_heads=2"]]:

        def refused(mistake=mistake) -> None:
            with pytest.raises(UserError):
                entry.train(require(settings(corpus, tmp_path, "--parallel.dp=1", *mistake), 1), CPU)

        run_ranks(1, refused)
        assert tree(tmp_path) == before, mistake
    (tmp_path / "events.jsonl").rename(tmp_path / "elsewhere")
    (tmp_path / "events.jsonl").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path)
    with pytest.raises(RankError, match=r"UserError: .*Too many levels of symbolic links .*events\.jsonl"):
        run(replace(config, training=replace(config.training, steps=3)))
    assert tree(tmp_path) == before


def test_a_named_checkpoint_of_another_model_is_refused_though_its_shapes_fit(corpus, tmp_path):
    run(settings(corpus, tmp_path / "first", "--parallel.dp=1", "--training.steps=2"))
    named = f"={tmp_path / 'first' / 'checkpoints' / 'step_000000002'}"
    for setting in "--checkpoint.resume", "--checkpoint.initialize_from":
        with pytest.raises(RankError, match="model.num_heads is 2, but the checkpoint was trained with 4"):
            run(settings(corpus, tmp_path / "second", "--parallel.dp=1", setting + named, "--model.num_heads=2", "--model.rotary_pct=0.5"))


def test_a_folder_has_one_run_at_a_time(corpus, tmp_path):
    config = settings(corpus, tmp_path, "--parallel.dp=1")
    with open(tmp_path / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RankError, match="is in use by"):
            run(config)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_is_used_with_a_notice(corpus, tmp_path, monkeypatch, capsys, code):
    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / ".lock").touch()
    RunFolder(settings(corpus, tmp_path), Ranks()).lock.close()
    assert f"cannot be locked ({os.strerror(code)}): start one run at a time" in capsys.readouterr().out


def test_a_refused_command_deletes_nothing_that_a_killed_save_left(corpus, tmp_path):
    run(settings(corpus, tmp_path, "--parallel.dp=1", "--training.steps=2"))
    left = tmp_path / "checkpoints" / "step_000000003.tmp-0123"
    left.mkdir()
    with pytest.raises(RankError, match="UserError"):
        run(settings(corpus, tmp_path, "--parallel.dp=1", "--model.num_heads=2"))
    assert left.is_dir()
    run(settings(corpus, tmp_path, "--parallel.dp=1", "--training.steps=3"))
    assert not left.exists()


def test_the_resolved_config_reproduces_the_run(corpus, tmp_path):
    first = run(settings(corpus, tmp_path / "first", "--parallel.dp=2", "--training.steps=4"))
    again = load(tmp_path / "first" / "config.toml", [f"--run.dir={tmp_path / 'second'}"])
    assert curve(run(again), "loss", "batch_hash") == curve(first, "loss", "batch_hash")


def test_resume_none_sets_the_old_checkpoints_aside(corpus, tmp_path):
    config = settings(corpus, tmp_path, "--parallel.dp=1", "--training.steps=2")
    first = run(config)
    second = run(replace(config, checkpoint=replace(config.checkpoint, resume="none")))
    assert curve(first, "loss") == curve(second, "loss")
    assert {path.name for path in (tmp_path / "before-1").iterdir()} == {"checkpoints", "config.toml", "metrics.jsonl", "events.jsonl"}
    assert curve(run(config), "loss") == curve(second, "loss")  # and "auto" goes on with the second run, which is complete


def test_fine_tuning_starts_from_weights_alone(corpus, tmp_path):
    pretrained = run(settings(corpus, tmp_path / "base", "--parallel.dp=2", "--training.steps=10"))
    start = tmp_path / "base" / "checkpoints" / "step_000000010"
    tuned = run(settings(corpus, tmp_path / "tuned", "--parallel.dp=1", f"--checkpoint.initialize_from={start}"))
    assert tuned[0]["step"] == 1 and tuned[0]["loss"] < pretrained[4]["loss"]


def test_weights_start_a_larger_vocabulary_another_rotary_base_and_another_epsilon(corpus, tmp_path, capfd):
    run(settings(corpus, tmp_path / "base", "--parallel.dp=1", "--training.steps=1", "--model.vocab_multiple_of=16"))
    start = tmp_path / "base" / "checkpoints" / "step_000000001"
    changes = ["--model.vocab_size=67", "--model.vocab_multiple_of=1", "--model.rotary_base=5e5", "--model.norm_eps=1e-6"]
    layout = ["--parallel.dp=2", "--parallel.tp=2", "--parallel.zero_stage=3", "--training.steps=1", "--checkpoint.save_steps=[0]"]
    config = settings(corpus, tmp_path / "tuned", *layout, *changes, f"--checkpoint.initialize_from={start}", "--run.seed=9")
    run(config)
    shown = capfd.readouterr().out
    assert "model.rotary_base is 500000.0, where the weights were trained with 10000.0" in shown
    assert "model.norm_eps is 1e-06, where the weights were trained with 1e-05" in shown
    old, new = CheckpointReader(start), CheckpointReader(tmp_path / "tuned" / "checkpoints" / "step_000000000")
    first = 60  # of 64 rows, of which the last four have no token
    assert "rows 60 to 66 of the embedding and the head are a new model's, drawn from run.seed" in shown
    for name in new.shapes:
        expected = old(name)
        if name in ("embed_in.weight", "embed_out.weight"):
            expected = initialize.draw(name, cards(config.model)[name], 9)
            expected[:first] = old(name)[:first]
        assert torch.equal(new(name), expected), name
    fewer = settings(corpus, tmp_path / "fewer", "--parallel.dp=1", f"--checkpoint.initialize_from={tmp_path / 'tuned/checkpoints/step_000000000'}")
    with pytest.raises(RankError, match="does not fit this model: different shapes: model.embed_in.weight"):
        run(fewer)


def test_pythia_steps_are_saved(corpus, tmp_path):
    run(settings(corpus, tmp_path, "--parallel.dp=1", "--training.steps=5", "--checkpoint.save_steps=pythia"))
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == [f"step_{step:09d}" for step in (0, 1, 2, 4, 5)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_like_fp32(corpus, tmp_path, precision):
    exact = run(settings(corpus, tmp_path / "fp32", "--parallel.dp=1"))
    rounded = run(settings(corpus, tmp_path / precision, "--parallel.dp=2", f"--training.precision={precision}"))
    assert rounded[-1]["loss"] == pytest.approx(exact[-1]["loss"], abs=0.1)
