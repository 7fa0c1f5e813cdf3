"""Learning rates by hand."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import pytest

from neox_native.config.schema import LrSchedule
from neox_native.optim.schedule import learning_rate

KINDS = get_args(get_type_hints(LrSchedule)["kind"])
PEAK, FLOOR, TOTAL, WARMUP = 1.0, 0.1, 1000, 100


def rate(kind: str, step: int, **settings: float) -> float:
    schedule = LrSchedule(kind=kind, warmup_fraction=WARMUP / TOTAL, min_lr=FLOOR, cooldown_fraction=0.2, **settings)
    return learning_rate(step, schedule, PEAK, TOTAL)


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_rises_linearly_from_the_first_step(kind: str) -> None:
    assert rate(kind, 1) == pytest.approx(PEAK / WARMUP)
    assert rate(kind, 50) == pytest.approx(PEAK / 2)
    assert rate(kind, WARMUP) == PEAK


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_never_rises_after_warmup_nor_falls_below_the_floor(kind: str) -> None:
    rates = [rate(kind, step) for step in range(WARMUP, 3 * TOTAL)]
    assert all(later <= earlier for earlier, later in zip(rates, rates[1:])) and rates[-1] >= FLOOR


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "inverse_sqrt"])
def test_the_rate_stays_after_the_end(kind: str) -> None:
    assert rate(kind, TOTAL) == rate(kind, TOTAL + 1) == rate(kind, 10 * TOTAL)


def test_shapes() -> None:
    middle = WARMUP + (TOTAL - WARMUP) // 2
    assert rate("cosine", middle) == pytest.approx((PEAK + FLOOR) / 2)
    assert rate("cosine", 325) == pytest.approx(FLOOR + (PEAK - FLOOR) / 2 * (1 + math.cos(math.pi / 4)))
    assert rate("linear", 325) == pytest.approx(FLOOR + (PEAK - FLOOR) * 0.75)
    assert rate("exponential", TOTAL) == pytest.approx(math.exp(-0.693))
    assert rate("constant", middle) == PEAK
    assert rate("inverse_sqrt", 4 * WARMUP) == pytest.approx(PEAK / 2)
    assert rate("wsd", 800) == PEAK and rate("wsd", 900) == pytest.approx((PEAK + FLOOR) / 2)
    assert [rate(kind, TOTAL) for kind in ("cosine", "linear", "wsd")] == pytest.approx([FLOOR] * 3)


def test_decay_steps_replace_the_length_of_the_run() -> None:
    assert rate("linear", 500, decay_steps=500) == FLOOR and rate("linear", 50, decay_steps=500) == PEAK


def test_no_warmup_starts_at_the_peak() -> None:
    schedule = LrSchedule(kind="cosine", warmup_fraction=0.0)
    assert learning_rate(1, schedule, PEAK, 10**6) == pytest.approx(PEAK, rel=1e-9)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown learning rate schedule"):
        learning_rate(500, LrSchedule(kind="triangle"), PEAK, TOTAL)  # type: ignore[arg-type]
