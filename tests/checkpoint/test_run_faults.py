"""Each fault that a long run meets, caused on purpose in a whole run."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train as entry
from neox_native.checkpoint import files
from neox_native.config.check import require
from neox_native.config.schema import Config, Run
from neox_native.durable import TEMPORARY
from neox_native.engine.step import TrainStep
from neox_native.reliability import watchdog as module
from neox_native.train import loop, start
from tests.checkpoint.small_runs import curve, events, run, saved, settings, write_corpus
from tests.ranks import RankError, run_ranks

TWO_RANKS = "--parallel.dp=2"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(settings(corpus, folder, TWO_RANKS))
    return curve(folder)


def at_step(number: int, on_rank: int, fault: Callable[[TrainStep], None]) -> Callable[[], None]:
    """Arrange for `fault` to happen on one rank when step `number` begins."""

    def arrange() -> None:
        call, steps = TrainStep.__call__, iter(range(1, 1000))

        def faulty(self, batch, rate):
            if next(steps) == number and dist.get_rank() == on_rank:
                fault(self)
            return call(self, batch, rate)

        TrainStep.__call__ = faulty  # type: ignore[method-assign]

    return arrange


def test_sigterm_on_one_rank_saves_on_all_and_the_run_goes_on_later(corpus, undisturbed, tmp_path):
    config = settings(corpus, tmp_path, TWO_RANKS)
    run(config, at_step(5, 1, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    assert saved(tmp_path) == ["step_000000004", "step_000000006"]
    (event,) = events(tmp_path, "signal")
    assert event["step"] == 6 and "SIGTERM" in event["message"]
    run(config)
    assert curve(tmp_path) == undisturbed


def die(_: TrainStep) -> None:
    raise AssertionError("killed here")


def restarted(on_rank: int) -> Callable[[], None]:
    """Let one rank's launcher say that it has restarted it: nodes count for themselves."""

    def arrange() -> None:
        if dist.get_rank() == on_rank:
            os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"

    return arrange


def started_again(on_rank: int) -> Callable[[], None]:
    """Let one rank's node be one of the last start, to which a node has come: nobody counts that as a restart."""

    def arrange() -> None:
        name = "old" if dist.get_rank() == on_rank else f"new_{os.getpid()}"
        os.environ["TORCHELASTIC_ERROR_FILE"] = f"/logs/none_{name}/attempt_0/{dist.get_rank()}/error.json"

    return arrange


def test_run_rewound_to_an_older_checkpoint_stays_on_the_new_branch_through_a_restart(corpus, undisturbed, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(settings(corpus, whole, TWO_RANKS))
    shutil.copytree(whole, broken)

    def rewound(folder: Path) -> Config:
        return settings(corpus, folder, TWO_RANKS, "--optimizer.lr=5e-3", f"--checkpoint.resume={folder}/checkpoints/step_000000004")

    run(rewound(whole))
    with pytest.raises(RankError, match="killed here"):
        run(rewound(broken), at_step(2, 1, die))
    assert saved(broken) == ["step_000000004"]
    assert saved(broken / "before-1") == ["step_000000008", "step_000000012"]
    run(rewound(broken), restarted(on_rank=1))
    assert curve(broken) == curve(whole) != undisturbed and len(curve(broken)) == 12
    assert saved(broken) == ["step_000000004", "step_000000008", "step_000000012"]
    assert not (broken / "before-2").exists()


def test_checkpoint_of_another_folder_stays_the_start_until_the_run_has_saved(corpus, tmp_path):
    run(settings(corpus, tmp_path / "first", TWO_RANKS, "--training.steps=4"))
    run(settings(corpus, tmp_path / "second", TWO_RANKS, "--training.steps=8", "--run.seed=7"))
    named = f"--checkpoint.resume={tmp_path}/first/checkpoints/step_000000004"
    config = settings(corpus, tmp_path / "second", TWO_RANKS, named)
    for arrange in at_step(2, 1, die), at_step(6, 1, die):
        with pytest.raises(RankError, match="killed here"):
            run(config, lambda arrange=arrange: (restarted(on_rank=1)(), arrange()))
    assert saved(tmp_path / "second") == ["step_000000008"]  # of the second start
    run(config, restarted(on_rank=1))
    assert saved(tmp_path / "second") == ["step_000000008", "step_000000012"]
    assert saved(tmp_path / "second" / "before-1") == ["step_000000004", "step_000000008"]
    run(settings(corpus, tmp_path / "first", TWO_RANKS))
    assert curve(tmp_path / "second")[-8:] == curve(tmp_path / "first")[-8:]


@pytest.mark.parametrize("again", [restarted, started_again])
def test_new_start_is_made_once_and_then_goes_on_through_restarts(corpus, undisturbed, tmp_path, again):
    run(settings(corpus, tmp_path, TWO_RANKS, "--run.seed=7"))
    config = settings(corpus, tmp_path, TWO_RANKS, "--checkpoint.resume=none")
    with pytest.raises(RankError, match="killed here"):  # restarted before it had begun: it starts anew
        run(config, lambda: (again(on_rank=1)(), at_step(6, 1, die)()))
    assert saved(tmp_path) == ["step_000000004"]
    run(config, again(on_rank=1))
    assert curve(tmp_path) == undisturbed and not (tmp_path / "before-2").exists()
    if again is started_again:
        with pytest.raises(RankError, match="killed here"):
            run(config, lambda: (again(on_rank=2)(), at_step(6, 1, die)()))  # other launchers: as it was told
        assert (tmp_path / "before-2").exists()


def nan_loss(step: TrainStep) -> None:
    """Make this step's loss NaN on this rank."""
    function = step.losses.function

    def poisoned(*arguments):
        step.losses.function = function
        poisonous = function(*arguments)
        poisonous.scale = poisonous.scale * float("nan")
        return poisonous

    step.losses.function = poisoned


def test_nan_batch_is_skipped_by_all_ranks_and_its_samples_are_logged(corpus, tmp_path):
    run(settings(corpus, tmp_path, TWO_RANKS), at_step(5, 1, nan_loss))
    (event,) = events(tmp_path, "bad step")
    assert event["step"] == 5 and event["sample_ids"] == list(range(32, 40))
    losses = [line[1] for line in curve(tmp_path)]
    assert losses[4] is None and all(loss is not None for loss in losses[5:]) and losses[-1] < losses[0]


def test_too_many_bad_steps_end_the_run_with_a_saved_state_until_a_setting_changes(corpus, undisturbed, tmp_path):
    def arrange() -> None:
        call = TrainStep.__call__

        def faulty(self, batch, rate):
            if 5 * 8 < batch.consumed_samples <= 8 * 8:
                nan_loss(self)
            return call(self, batch, rate)

        TrainStep.__call__ = faulty  # type: ignore[method-assign]

    for start in arrange, restarted(on_rank=1):
        with pytest.raises(RankError, match="3 steps in a row .* training.max_bad_steps = 2.*step_000000004\" is the newest"):
            run(settings(corpus, tmp_path, TWO_RANKS, "--training.max_bad_steps=2"), start)
        assert saved(tmp_path) == ["step_000000004", "step_000000008"] and len(curve(tmp_path)) == 8
    run(settings(corpus, tmp_path, TWO_RANKS, "--training.max_bad_steps=3"))
    assert len(curve(tmp_path)) == 12 and curve(tmp_path)[-1][1] is not None
    older = f"--checkpoint.resume={tmp_path}/checkpoints/step_000000004"
    run(settings(corpus, tmp_path, TWO_RANKS, "--training.max_bad_steps=2", older))
    assert curve(tmp_path) == undisturbed


def test_a_run_that_diverges_erases_none_of_its_good_checkpoints(corpus, tmp_path):
    kept = ["--parallel.dp=1", "--checkpoint.save_every=2", "--checkpoint.keep_last=3", "--checkpoint.async=true"]
    run(settings(corpus, tmp_path, *kept, "--training.steps=6"))
    diverging = settings(corpus, tmp_path, *kept, "--training.steps=40", "--optimizer.lr=1e30", "--training.max_bad_steps=4")
    for _ in range(2):
        with pytest.raises(RankError, match="5 steps in a row .* training.max_bad_steps = 4"):
            run(diverging, restarted(on_rank=0))
        assert saved(tmp_path) == [f"step_{step:09d}" for step in (2, 4, 6, 8, 10, 12)]
    good = tmp_path / "checkpoints" / "step_000000006"
    run(settings(corpus, tmp_path, *kept, "--training.steps=8", f"--checkpoint.resume={good}"))
    assert saved(tmp_path) == [f"step_{step:09d}" for step in (4, 6, 8)] and curve(tmp_path)[-1][1] is not None


def test_bad_steps_end_a_run_that_logs_seldom(corpus, tmp_path):
    seldom = ["--parallel.dp=1", "--logging.every=1000", "--checkpoint.save_every=1000", "--training.max_bad_steps=4"]
    with pytest.raises(RankError, match="[0-9] steps in a row .* training.max_bad_steps = 4"):
        run(settings(corpus, tmp_path, *seldom, "--training.steps=30", "--optimizer.lr=1e30"))
    assert saved(tmp_path)[-1] <= "step_000000015" and len(events(tmp_path, "bad step")) <= 2 * 4 + 1


def full_disk(*steps: int) -> Callable[[], None]:
    """Let rank 1 find no space, once for each of these checkpoints. Every second step waits for saves in the background."""

    def arrange() -> None:
        write, call, failing = files.ChecksumStream.write, TrainStep.__call__, {f"step_{step:09d}" for step in steps}

        def failing_once(self: files.ChecksumStream, data: bytes) -> int:
            folder = Path(str(self.raw.name)).parent.name.split(TEMPORARY)[0]
            if dist.get_rank() == 1 and folder in failing:
                failing.remove(folder)
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(self, data)

        def waiting(self, batch, rate):
            if batch.consumed_samples % 16 == 0:
                for thread in threading.enumerate():
                    if thread.name == "checkpoint":
                        thread.join()
            return call(self, batch, rate)

        files.ChecksumStream.write = failing_once  # type: ignore[method-assign]
        TrainStep.__call__ = waiting  # type: ignore[method-assign]

    return arrange


@pytest.mark.parametrize("in_background", ["false", "true"])
def test_full_disk_ends_the_run_with_a_sentence_and_what_was_saved_before_is_whole(
    corpus, undisturbed, tmp_path, in_background
):
    config = settings(corpus, tmp_path, TWO_RANKS, f"--checkpoint.async={in_background}")
    with pytest.raises(RankError, match="Saving the checkpoint of step .* rank 1.*No space left on device"):
        run(config, full_disk(*range(8, 13)))
    assert saved(tmp_path) == ["step_000000004"]
    run(config)
    assert curve(tmp_path) == undisturbed


@pytest.mark.parametrize("failing, again", [(8, (9, 10, 11)), (12, (12,))])
def test_save_that_fails_in_the_background_is_told_at_once_and_tried_again(corpus, undisturbed, tmp_path, failing, again):
    run(settings(corpus, tmp_path, TWO_RANKS, "--checkpoint.async=true"), full_disk(failing))
    (event,) = events(tmp_path, "save failed")
    assert f"Saving the checkpoint of step {failing}" in event["message"] and "the next save tries again" in event["message"]
    assert event["step"] in again and f"step_{event['step']:09d}" in saved(tmp_path)
    assert saved(tmp_path)[-1] == "step_000000012" and curve(tmp_path) == undisturbed


def test_flipped_bit_costs_the_steps_since_the_checkpoint_before(corpus, undisturbed, tmp_path, capfd):
    config = settings(corpus, tmp_path, TWO_RANKS)
    run(config)
    shard = sorted((tmp_path / "checkpoints" / "step_000000012").glob("*.distcp"))[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    run(config)
    assert curve(tmp_path) == undisturbed
    shown = capfd.readouterr().out
    assert f"{shard} is damaged" in shown and "step_000000008 at step 8" in shown


def test_rank_with_another_config_is_named_before_anything_is_written(corpus, tmp_path):
    def rank() -> None:
        other = "--optimizer.lr=0.5" if dist.get_rank() == 1 else "--optimizer.lr=0.001"
        entry.train(require(settings(corpus, tmp_path / "run", TWO_RANKS, other), 2), torch.device("cpu"))

    with pytest.raises(RankError, match="Rank 1 on host .* optimizer.lr is 0.5 there, 0.001 on rank 0"):
        run_ranks(2, rank)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "layout, name, axis, every, found_at",
    [
        (["--parallel.dp=2"], "layers.2.mlp.dense_h_to_4h.weight", "dp", 2, 6),
        (["--parallel.dp=2", "--training.precision=bf16"], "layers.2.mlp.dense_h_to_4h.weight", "dp", 100, 8),
        (["--parallel.dp=1", "--parallel.tp=2"], "layers.1.input_layernorm.bias", "tp", 2, 6),
        (["--parallel.dp=1", "--parallel.tp=2", "--model.num_kv_heads=1"], "layers.0.attention.query_key_value.weight", "tp", 2, 6),
        (["--parallel.dp=1", "--parallel.pp=2", "--model.tie_embeddings=true"], "embed_in.weight", "pp", 2, 6),
    ],
    ids=["dp", "dp bf16, at a save", "tp", "tp shared heads", "pp"],
)
def test_changed_weight_of_one_replica_is_named_before_it_is_saved(corpus, tmp_path, layout, name, axis, every, found_at):
    def change(step: TrainStep) -> None:
        master = next(t for t in step.optimizer.trained if t.spec.name == name)
        master.shard.view(-1)[-3] += 1e-5  # bf16 would round the change away

    with pytest.raises(RankError, match=rf"step {found_at}: {name} differs between the {axis} replicas \[0, 1\]"):
        run(settings(corpus, tmp_path, *layout, f"--run.check_replicas_every={every}"), at_step(5, 1, change))
    assert saved(tmp_path) == ["step_000000004"]


def test_rank_that_sleeps_for_ever_ends_the_job_with_a_report(corpus, tmp_path, capfd):
    def sleep_for_ever(_: TrainStep) -> None:
        threading.Event().wait()

    config = settings(corpus, tmp_path, TWO_RANKS)
    quick = Run(**{**vars(config.run), "watchdog_factor": 2.0, "watchdog_min_seconds": 1.0})
    with pytest.raises((RankError, FileNotFoundError)):  # the ranks leave no result behind
        run(replace(config, run=quick), at_step(6, 1, sleep_for_ever))
    report = capfd.readouterr().err
    assert "rank 1 (" in report and "step 6, train" in report and "in sleep_for_ever" in report
    assert sorted(path.name for path in (tmp_path / "flight_recorder").iterdir()) == [
        "collectives_rank_0.json", "collectives_rank_1.json",
    ]  # fmt: skip
    assert saved(tmp_path) == ["step_000000004"]


def test_request_during_an_evaluation_saves_before_its_end(corpus, tmp_path, monkeypatch):
    evaluate = loop.evaluate

    def interrupted(*args):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        share = evaluate(*args)
        assert saved(tmp_path) == ["step_000000004"]
        return share

    monkeypatch.setattr(loop, "evaluate", interrupted)
    evaluation = ("--evaluation.every=4", "--evaluation.batches=3", "--data.split=80,20,0")
    run(settings(corpus, tmp_path, TWO_RANKS, "--checkpoint.save_every=100", *evaluation))
    assert [event["step"] for event in events(tmp_path, "evaluation") + events(tmp_path, "signal")] == [4, 4]


def test_rank_that_is_stopped_while_data_is_opened_is_named(corpus, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    open_data = start.build_data

    def stop_rank_1(*args, **settings):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return open_data(*args, **settings)

    monkeypatch.setattr(start, "build_data", stop_rank_1)
    config = settings(corpus, tmp_path, TWO_RANKS, "--run.watchdog_startup_seconds=3")
    with pytest.raises((RankError, FileNotFoundError)):
        run(config)
    report = capfd.readouterr().err
    assert "ranks [1]: no answer (stopped, dead" in report and "step 0, open data" in report
