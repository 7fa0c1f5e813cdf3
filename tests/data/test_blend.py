"""The blend equals GPT-NeoX's greedy loop, choice by choice."""

from __future__ import annotations

import random

import numpy as np
import pytest

from neox_native.data import blend as module
from neox_native.data.blend import Blend, normalised, rounded_shares
from tests.data.corpora import blend

WEIGHTS = {
    "equal": [1.0] * 7,
    "ratio": [3, 1],
    "single": [2.5],
    "tiny": [1, 1e-5, 3, 1e-3],
    "tenths": [0.1, 0.2, 0.3, 0.4],
    "many": [random.Random(1).random() for _ in range(22)],
    "whole": [random.Random(2).randint(1, 20) for _ in range(12)],
}


@pytest.fixture
def short_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LANE_SAMPLES", 64)
    monkeypatch.setattr(module, "LANES_AT_ONCE", 7)


@pytest.mark.parametrize("warmup", [1, 16])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_blend_equals_the_greedy_loop(
    short_lanes: None, monkeypatch: pytest.MonkeyPatch, weights: list[float], warmup: int
) -> None:
    monkeypatch.setattr(module, "WARMUP_SAMPLES", warmup)
    expected = blend(weights, 3000)
    made = Blend(weights, 3000)
    assert [made.locate(sample) for sample in range(3000)] == expected


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 128, 1000])
def test_counts_and_inverse(short_lanes: None, count: int) -> None:
    made = Blend(WEIGHTS["whole"], count)
    expected = blend(WEIGHTS["whole"], count)
    assert made.counts().tolist() == [sum(dataset == number for dataset, _ in expected) for number in range(12)]
    assert [made.stream_sample(*place) for place in expected] == list(range(count))


def test_wrong_guesses_are_mended(short_lanes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WARMUP_SAMPLES", 0)
    monkeypatch.setattr(
        module, "rounded_shares", lambda weights, totals: np.zeros((len(totals), len(weights)), np.int64)
    )
    made = Blend([1, 1e-2, 3], 1000)
    assert [made.locate(sample) for sample in range(1000)] == blend([1, 1e-2, 3], 1000)


def test_a_longer_blend_continues_a_shorter_one() -> None:
    short, long = Blend(WEIGHTS["many"], 500), Blend(WEIGHTS["many"], 20000)
    assert [short.locate(sample) for sample in range(500)] == [long.locate(sample) for sample in range(500)]


def test_rounded_shares_sum_to_their_totals() -> None:
    shares = rounded_shares(normalised(WEIGHTS["many"]), np.array([0, 1, 10, 12345]))
    assert shares.sum(axis=1).tolist() == [0, 1, 10, 12345] and (shares >= 0).all()
