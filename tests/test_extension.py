"""The house takes what it has never seen: a layer kind with losses of its own, and an objective, that only this file knows
train, save, resume and are counted in every layout. No line of the package names them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import train as entry
from neox_native.config.check import require
from neox_native.config.load import load
from neox_native.config.schema import Config, Model, Objective
from neox_native.data.indexed import IndexedWriter
from neox_native.engine.objective import OBJECTIVES, NextToken, objective_of
from neox_native.errors import UserError
from neox_native.interop.checkpoints import CheckpointReader
from neox_native.model.auxiliary import AuxiliaryLoss
from neox_native.model.kinds import KINDS, Kind, kinds_of_layers
from neox_native.model.layers import OutputLinear, Vector, input_cards, output_cards
from neox_native.model.parameters import Card, Cards, constant, vector
from neox_native.model.positions import Context
from neox_native.plan.dry_run import dry_run
from tests.ranks import run_ranks

TAPS = 3
CPU = torch.device("cpu")


class MovingAverage(nn.Module):
    """y_t = sum over k of w_k u_(t-k), where u is a projection of the input with a scale for each channel: a mixer that looks
    back alone. It wants u small, and inputs that each channel's share of the tokens sees alike."""

    def __init__(self, model: Model):
        super().__init__()
        self.enter = nn.Linear(model.hidden_size, model.hidden_size)
        self.scale = Vector(model.hidden_size)
        self.taps = Vector(TAPS)
        self.leave = OutputLinear(model.hidden_size, model.hidden_size)
        self.small, self.even = AuxiliaryLoss("size"), AuxiliaryLoss("unevenness")

    @property
    def output_bias(self) -> nn.Parameter:
        return self.leave.bias

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        u_BTD, weights = self.enter(x_BTD) * self.scale(), self.taps()
        u_BTD = self.small(u_BTD, 0.01 * u_BTD.square().sum(), context.step)  # of this holder's channels
        u_BTD = self.even(u_BTD, 0.1 * (x_BTD.softmax(-1).sum((0, 1)) ** 2).sum(), context.step)  # of all channels
        length, past_BSD = u_BTD.shape[1], F.pad(u_BTD, (0, 0, TAPS - 1, 0))
        return self.leave(sum(weights[k] * past_BSD[:, TAPS - 1 - k :][:, :length] for k in range(TAPS)))


def cards_of(lr_multiplier: float = 1.0):
    def cards(model: Model) -> Cards:
        taps = Card((TAPS,), constant(0.5), decay=False, gradient="partial", role="vector", lr_multiplier=lr_multiplier)
        scale = vector(model.hidden_size, 0.9, cut=0)
        ends = [input_cards("enter", model, model.hidden_size, True), output_cards("leave", model, model.hidden_size, True)]
        return ends[0] | {"scale.weight": scale, "taps.weight": taps} | ends[1]

    return cards


class Cautious(NextToken):
    """Unlikely targets count more, and are counted."""

    metrics = ("unlikely",)

    def __call__(self, values_BT: Tensor, fields: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return (values_BT + 0.1 * values_BT**2).sum(), {"unlikely": (values_BT > 4).sum()}


TOY = Kind("toy", MovingAverage, cards_of(), module="toy", norm="toy_norm")
QUICK = Kind("quick", MovingAverage, cards_of(lr_multiplier=4.0), module="toy", norm="toy_norm")
SETTINGS = [
    '--model.pattern=["attention+feed_forward", "toy"]', "--model.num_layers=4", "--model.hidden_size=32",
    "--model.num_heads=4", "--model.seq_length=16", "--model.vocab_size=60", "--model.vocab_multiple_of=4",
    "--training.steps=4", "--training.global_batch_size=8", "--training.micro_batch_size=1", "--optimizer.lr=1e-2",
    "--objective.kind=cautious", "--optimizer.eps=1e-6", "--logging.every=1", "--logging.tensorboard=false", "--run.device=cpu",
]  # fmt: skip
LAYOUTS = {
    "pp 2, dp 2, tp 2, ZeRO-1": ["--parallel.pp=2", "--parallel.dp=2", "--parallel.tp=2", "--parallel.zero_stage=1"],
    "dp 4, ZeRO-3, recomputed, compiled": [
        "--parallel.dp=4", "--parallel.zero_stage=3", "--training.activation_checkpointing=full", "--compile.enabled=true",
    ],
    "tp 2, sequence cut": ["--parallel.tp=2", "--parallel.sequence_parallel=true"],
    "pp 2, zero bubble, recomputed": [
        "--parallel.pp=2", "--parallel.pipeline_schedule=zbv", "--parallel.virtual_stages=2",
        "--training.activation_checkpointing=full",
    ],
}  # fmt: skip


def register(patch: pytest.MonkeyPatch) -> None:
    for kind in (TOY, QUICK):
        patch.setitem(KINDS, kind.name, kind)
    patch.setitem(OBJECTIVES, "cautious", lambda settings: Cautious())


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = str(tmp_path_factory.mktemp("data") / "corpus")
    with IndexedWriter(prefix, np.uint16) as writer:
        for number in range(40):
            writer.add_document((np.arange(50 + 3 * number) * (1 + number % 3) + number) % 60)
    return prefix


def settings(corpus: str, folder: Path, *overrides: str) -> Config:
    config = load(None, [*SETTINGS, f"--data.train={corpus}", f"--run.dir={folder}", *overrides])
    return require(config, config.parallel.pp * max(config.parallel.dp, 1) * config.parallel.tp)


def run(config: Config) -> list[dict]:
    """Train; returns the log."""
    parallel = config.parallel
    run_ranks(parallel.pp * parallel.dp * parallel.tp, lambda: entry.train(config, CPU))
    return [json.loads(line) for line in Path(config.run.dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def alone(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What one process logs."""
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        return run(settings(corpus, tmp_path_factory.mktemp("alone")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_unknown_kind_trains_the_same_in_every_layout(layout: str, corpus: str, alone: list[dict], tmp_path: Path) -> None:
    logged = run(settings(corpus, tmp_path, *LAYOUTS[layout]))
    for name in ("loss", "grad_norm", "size", "unevenness", "unlikely"):
        assert [line[name] for line in logged] == pytest.approx([line[name] for line in alone], rel=1e-5), name


def test_its_checkpoint_goes_on_in_another_layout(corpus: str, alone: list[dict], tmp_path: Path) -> None:
    first = ["--parallel.pp=2", "--parallel.tp=2", "--training.steps=2", "--lr_schedule.decay_steps=4"]
    run(settings(corpus, tmp_path, *first))
    resumed = run(settings(corpus, tmp_path, "--parallel.dp=2", "--parallel.zero_stage=3"))
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in alone], rel=1e-5)


def test_the_dry_run_counts_it(corpus: str, tmp_path: Path) -> None:
    mesh = LAYOUTS["tp 2, sequence cut"]
    without = '--model.pattern=["attention+feed_forward", "feed_forward"]'
    counted, other = (dry_run(settings(corpus, tmp_path, *mesh, *more), 0, 2) for more in ((), (without,)))
    toy = 16 * 32 + 16 + 16 + TAPS + 32 * 16 + 32  # on one of two ranks
    feed_forward = 64 * 32 + 64 + 32 * 64 + 32
    assert other.parameters - counted.parameters == 2 * (feed_forward - toy)
    assert 0 < counted.hardware_flops < other.hardware_flops and counted.peak_bytes < other.peak_bytes


def test_a_parameter_has_the_learning_rate_and_the_decay_of_its_card(corpus: str, tmp_path: Path) -> None:
    base = ["--optimizer.name=sgd", "--training.steps=1", "--training.clip_grad_norm=0", "--lr_schedule.warmup_fraction=0"]
    base += ["--checkpoint.save_steps=[0]"]
    moved = {}
    for kind, *more in (TOY, "--optimizer.weight_decay=0"), (QUICK, "--optimizer.weight_decay=0.5", "--parallel.tp=2"):
        pattern = f'--model.pattern=["attention+feed_forward", "{kind.name}"]'
        run(settings(corpus, tmp_path / kind.name, *base, pattern, *more))
        saved = [CheckpointReader(tmp_path / kind.name / "checkpoints" / f"step_{step:09d}") for step in (0, 1)]
        before, after = (reader(f"layers.1.{kind.module}.taps.weight") for reader in saved)
        moved[kind.name] = after - before
    torch.testing.assert_close(moved["quick"], 4 * moved["toy"], rtol=0, atol=5e-7)
    assert moved["toy"].abs().max() > 1e-4  # rounding of weights around 0.5 is 6e-8


def test_an_objective_that_nobody_has_defined_is_refused() -> None:
    with pytest.raises(UserError, match="objective.kind = 'dpo' is none of cautious, next_token"):
        objective_of(Objective("dpo"))


def test_two_kinds_of_one_layer_do_not_share_a_name() -> None:
    with pytest.raises(UserError, match="'toy[+]quick' .* two whose parameters would have the same names"):
        kinds_of_layers(Model(pattern=["toy+quick"]))
