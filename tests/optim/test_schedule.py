"""Learning rates by hand."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import pytest
import torch

from neox_native.config.schema import LrSchedule
from neox_native.optim.schedule import Rates, learning_rate

KINDS = get_args(get_type_hints(LrSchedule)["kind"])
PEAK, FLOOR, TOTAL, WARMUP = 1.0, 0.1, 1000, 100


def rate(kind: str, done: int, **settings: float) -> float:
    """The rate of the update after `done` others."""
    schedule = LrSchedule(kind=kind, warmup_fraction=WARMUP / TOTAL, min_lr=FLOOR, cooldown_fraction=0.2, **settings)
    return learning_rate(done + 1, schedule, PEAK, TOTAL)


def gpt_neox(kind: str, num_iters: int, peak: float, floor: float, warmup: float, total: int) -> float:
    """GPT-NeoX's rule: its scheduler is at 0 for the first update, and takes a step after each."""
    if warmup > 0 and num_iters <= warmup:
        return peak * num_iters / warmup
    past, length = num_iters - warmup, total - warmup
    value = {
        "linear": peak * (length - past) / length,
        "cosine": floor + (peak - floor) / 2.0 * (math.cos(math.pi * past / length) + 1),
        "exponential": peak * math.exp(-0.693 * past / length),
        "constant": peak,
    }
    return max(value[kind], floor)


@pytest.mark.parametrize("kind", ["cosine", "linear", "exponential", "constant"])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.0105, 0.5])
def test_every_update_has_the_rate_that_gpt_neox_gives_it(kind: str, fraction: float) -> None:
    schedule = LrSchedule(kind=kind, warmup_fraction=fraction, min_lr=6e-5)
    for update in range(1, 1500 + 1):
        expected = gpt_neox(kind, min(update - 1, 1000) if kind == "cosine" else update - 1, 6e-4, 6e-5, fraction * 1000, 1000)
        assert learning_rate(update, schedule, 6e-4, 1000) == pytest.approx(expected, rel=1e-12), update


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_rises_linearly_from_zero(kind: str) -> None:
    assert [rate(kind, done) for done in (0, 1, 50, WARMUP)] == pytest.approx([0.0, PEAK / WARMUP, PEAK / 2, PEAK])


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_never_rises_after_warmup_nor_falls_below_the_floor(kind: str) -> None:
    rates = [rate(kind, done) for done in range(WARMUP, 3 * TOTAL)]
    assert all(later <= earlier for earlier, later in zip(rates, rates[1:])) and rates[-1] >= FLOOR


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_the_rate_stays_after_the_end(kind: str) -> None:
    assert rate(kind, TOTAL) == rate(kind, TOTAL + 1) == rate(kind, 10 * TOTAL)


def test_shapes() -> None:
    middle = WARMUP + (TOTAL - WARMUP) // 2
    assert rate("cosine", middle) == pytest.approx((PEAK + FLOOR) / 2)
    assert rate("linear", 325) == pytest.approx(PEAK * 0.75)
    assert rate("exponential", TOTAL) == pytest.approx(math.exp(-0.693))
    assert rate("inverse_sqrt", 4 * WARMUP) == pytest.approx(PEAK / 2)
    assert rate("wsd", 800) == PEAK and rate("wsd", 900) == pytest.approx((PEAK + FLOOR) / 2)
    assert [rate(kind, TOTAL) for kind in ("cosine", "linear", "wsd")] == pytest.approx([FLOOR] * 3)


def test_decay_steps_replace_the_length_of_the_run() -> None:
    assert rate("linear", 500, decay_steps=500) == FLOOR and rate("linear", 50, decay_steps=500) == PEAK


@pytest.mark.parametrize("kind", KINDS)
def test_no_warmup_starts_at_the_peak(kind: str) -> None:
    assert learning_rate(1, LrSchedule(kind=kind, warmup_fraction=0.0), PEAK, 10) == PEAK


def test_overflowed_steps_take_no_rate() -> None:
    overflows = torch.tensor(0)
    plain, scaled = (Rates(LrSchedule(warmup_fraction=0.5), PEAK, 10, count) for count in (None, overflows))
    assert [float(scaled(step)) for step in range(1, 11)] == pytest.approx([float(plain(step)) for step in range(1, 11)])
    overflows.add_(3)
    assert [float(scaled(step)) for step in range(4, 11)] == pytest.approx([float(plain(step)) for step in range(1, 8)])


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown learning rate schedule"):
        learning_rate(500, LrSchedule(kind="triangle"), PEAK, TOTAL)  # type: ignore[arg-type]
