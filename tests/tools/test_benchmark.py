"""The benchmark of `run.determinism`, on a model that takes no time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from neox_native.config.check import require
from neox_native.config.schema import Config, Model, Parallel, Training
from neox_native.plan.dry_run import fake_batch
from tests.ranks import run_ranks
from tools.benchmarks import determinism
from tools.benchmarks.determinism import MODES, together


def test_a_mode_moves_what_the_closed_form_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(determinism, "batches", lambda config, steps: [fake_batch(config)] * steps)
    model = Model(num_layers=1, hidden_size=32, num_heads=2, seq_length=16, vocab_size=64)
    training = Training(global_batch_size=4, micro_batch_size=1)
    config = require(Config(model=model, training=training, parallel=Parallel(dp=2, zero_stage=1)), 2)
    configs = {mode: replace(config, run=replace(config.run, determinism=mode)) for mode in MODES}
    answers = run_ranks(2, determinism.measure, configs, 1)
    found = {mode: together([answer[mode] for answer in answers]) for mode in MODES}
    for figures in found.values():
        assert figures.sent_bytes == figures.predicted_bytes and len(figures.seconds) == 1
    assert found["fast"].sent_bytes < found["elastic"].sent_bytes < 2 * found["fast"].sent_bytes
    assert found["elastic"].loss == pytest.approx(found["bitwise"].loss, rel=1e-6)
