"""One line per logged step, in full precision, and no step twice."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from neox_native.errors import UserError
from neox_native.metrics.writers import Scale, StepRecord, Writers, console_line, strict_json

RECORD = StepRecord(
    step=10, loss=0.1 + 0.2, grad_norm=1 / 3, learning_rate=1e-3, consumed_samples=320, tokens_per_second=12345.6,
    step_seconds=0.5, tflops_per_device=0.25, mfu=None, mfu_causal=None, peak_memory_bytes=10**9, batch_hash="0123456789abcdef",
)
SCALE = Scale(total_steps=1000, sample_tokens=2048, memory_bytes=2 * 10**9)
KEYS = [
    "step", "loss", "grad_norm", "learning_rate", "consumed_samples", "tokens_per_second", "step_seconds",
    "tflops_per_device", "mfu", "mfu_causal", "peak_memory_bytes", "batch_hash",
]


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def writers(folder: Path, resumed_step: int = 0, tensorboard: bool = False) -> Writers:
    return Writers(folder, resumed_step, SCALE, "[run]", tensorboard)


def test_line_has_exactly_the_promised_keys_and_bits(tmp_path: Path) -> None:
    writer = writers(tmp_path)
    writer.step(RECORD, {"loss scale": 4096.0})
    # Read before closing: a killed run has lost nothing that was logged.
    (line,) = lines(tmp_path)
    assert list(line) == KEYS
    assert line["loss"] == 0.1 + 0.2 and line["grad_norm"] == 1 / 3 and line["mfu"] is None
    writer.close()


def test_resuming_cuts_off_what_lies_beyond_and_torn_lines(tmp_path: Path) -> None:
    writer = writers(tmp_path)
    for step in (10, 20, 30):
        writer.step(replace(RECORD, step=step))
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')
    writer = writers(tmp_path, resumed_step=20)
    writer.step(replace(RECORD, step=30, loss=7.0))
    writer.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(10, 0.1 + 0.2), (20, 0.1 + 0.2), (30, 7.0)]


def test_number_that_is_not_finite_is_null() -> None:
    assert json.loads(strict_json({"loss": math.nan, "grad_norm": math.inf, "step": 1})) == {
        "loss": None, "grad_norm": None, "step": 1,
    }


def test_console_line_says_it_all() -> None:
    line = console_line(replace(RECORD, mfu=0.412, mfu_causal=0.385), SCALE, 65.4, {"stall": 0.25, "skipped": 1})
    assert line == (
        "step   10/1000  loss 0.3000  lr 1.00e-03  grad norm 0.333  0.5 s/step  12,346 tokens/s  0.25 TFLOP/s  MFU 41.2% (38.5% causal)  "
        "peak memory 954 MiB (50%)  0.655M tokens seen  0:01:05 elapsed  0:08:15 left  stall 0.25  skipped 1"
    )
    assert "MFU" not in console_line(RECORD, SCALE, 0.0)


def test_the_best_evaluation_is_remembered_through_a_restart(tmp_path: Path) -> None:
    writer = writers(tmp_path)
    assert writer.best is None
    for step, loss in (10, 2.5), (20, 2.0), (30, None), (40, 1.0):
        writer.event("evaluation", step, "validation", loss=loss)
    assert writer.best == (1.0, 40)
    writer.close()
    writer = writers(tmp_path, resumed_step=30)
    assert writer.best == (2.0, 20)
    writer.close()


def test_events_are_kept_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = writers(tmp_path)
    writer.event("evaluation", 10, "step 10: validation loss 2.1", loss=2.1)
    (event,) = lines(tmp_path, "events.jsonl")
    assert event["kind"] == "evaluation" and event["loss"] == 2.1 and capsys.readouterr().out == "step 10: validation loss 2.1\n"
    writer.close()


def test_torn_event_makes_way_for_the_next_one(tmp_path: Path) -> None:
    for step, torn in (1, '{"time": "20'), (2, ""), (3, ""):
        writer = writers(tmp_path)
        writer.event("checkpoint", step, "saved")
        writer.close()
        with open(tmp_path / "events.jsonl", "a") as file:
            file.write(torn)
    assert [event["step"] for event in lines(tmp_path, "events.jsonl")] == [1, 2, 3]


def test_restart_before_an_evaluation_leaves_it_to_be_written_once(tmp_path: Path) -> None:
    for resumed_step in 0, 4:  # it was killed after step 6 and resumed at step 4
        writer = writers(tmp_path, resumed_step)
        for step in range(resumed_step + 2, 8, 2):
            writer.event("evaluation", step, "validation loss 2.1", loss=2.1)
            writer.event("checkpoint", step, "saved")
        writer.close()
    kinds = [(event["kind"], event["step"]) for event in lines(tmp_path, "events.jsonl")]
    assert [step for kind, step in kinds if kind == "evaluation"] == [2, 4, 6]
    assert [step for kind, step in kinds if kind == "checkpoint"] == [2, 4, 6, 6]  # it was saved twice indeed


def test_junk_in_the_logs_is_dropped(tmp_path: Path) -> None:
    junk = b"\xff\xfe\x00\r\n" + b"[" * 100_000 + b'\n{"step": 1e999}\n[1]\n{"step": ' + b"9" * 5000 + b"}\n\x00"
    for name in "metrics.jsonl", "events.jsonl":
        (tmp_path / name).write_bytes(b'{"step": 1}\n' + junk)
    writer = writers(tmp_path, resumed_step=1)
    writer.close()
    assert lines(tmp_path) == [{"step": 1}]
    assert [event["step"] for event in lines(tmp_path, "events.jsonl")] == [1, math.inf]


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_logs_that_lead_elsewhere_are_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text('{"step": 0}\n')
    (tmp_path / name).symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"Writing the log in {tmp_path} failed"):
        writers(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"Writing the log in {tmp_path} failed"):
        writers(tmp_path)
    assert elsewhere.read_text() == '{"step": 0}\n'


def test_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neox_native.metrics.writers.append_to", lambda path: open("/dev/full", "a", buffering=1))
    writer = writers(tmp_path)
    attempts = lambda: writer.step(RECORD), lambda: writer.event("checkpoint", 10, "saved"), writer.close
    for attempt in attempts:
        with pytest.raises(UserError, match=f"Writing the log in {tmp_path} failed: No space left on device; mend that"):
            attempt()


def test_tensorboard_holds_scalars_and_the_config(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = writers(tmp_path, tensorboard=True)
    writer.step(RECORD)
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {"train/loss", "train/grad_norm", "train/tokens_per_second"} <= set(board.Tags()["scalars"])
    assert board.Tags()["tensors"] == ["config/text_summary"]
