"""Numbers for people."""

from __future__ import annotations

import pytest

from neox_native.units import count, counted, share_of_step, size


@pytest.mark.parametrize(
    "number, shown",
    [(0, "0 B"), (15, "15 B"), (999, "999 B"), (1000, "0.977 KiB"), (2**20, "1 MiB"), (513 * 2**20, "513 MiB")]
    + [(24.4 * 2**30, "24.4 GiB"), (1023 * 2**30, "0.999 TiB"), (-(2**31), "-2 GiB")],
)
def test_sizes_have_one_unit_and_three_digits(number: float, shown: str) -> None:
    assert size(number) == shown


def test_counts_have_three_digits() -> None:
    assert [count(n) for n in (12_000, 929_536, 20.6e9, 3e12)] == ["12,000", "0.93M", "20.6B", "3T"]


def test_one_thing_is_singular() -> None:
    assert [counted(n, "rank") for n in (1, 2, 1024)] == ["1 rank", "2 ranks", "1,024 ranks"]


def test_a_bubble_of_as_long_as_the_compute_is_half_of_the_step() -> None:
    assert share_of_step(1.0) == 0.5 and share_of_step(0.0) == 0.0
