"""The dynamic loss scale, step by step."""

from __future__ import annotations

import torch

from neox_native.config.schema import Training
from neox_native.optim.loss_scale import LossScale


def scale_with(window: int = 3, hysteresis: int = 2, minimum: float = 1.0) -> LossScale:
    settings = Training(
        initial_loss_scale=16.0, loss_scale_window=window, loss_scale_hysteresis=hysteresis, min_loss_scale=minimum
    )
    return LossScale(settings, torch.device("cpu"))


def after(scale: LossScale, overflows: str) -> list[float]:
    """The scale after each step; "x" is an overflow."""
    history = []
    for letter in overflows:
        scale.update(torch.tensor(float(letter == "x")))
        history.append(scale.scale.item())
    return history


def test_starts_at_two_to_the_twelfth_by_default() -> None:
    assert LossScale(Training(), torch.device("cpu")).scale.item() == 2.0**12


def test_doubles_after_a_window_without_overflow() -> None:
    assert after(scale_with(), "......") == [16, 16, 32, 32, 32, 64]


def test_an_overflow_restarts_the_window() -> None:
    assert after(scale_with(), "..x...") == [16, 16, 16, 16, 16, 32]


def test_halves_at_the_second_overflow_and_at_every_further_one() -> None:
    assert after(scale_with(), "xxx.x") == [16, 8, 4, 4, 2]


def test_doubling_restores_the_patience() -> None:
    assert after(scale_with(), "xx...x") == [16, 8, 8, 8, 16, 16]


def test_never_falls_below_the_minimum() -> None:
    assert after(scale_with(hysteresis=1, minimum=4.0), "xxxx") == [8, 4, 4, 4]


def test_state_resumes() -> None:
    whole, first, second = scale_with(), scale_with(), scale_with()
    expected = after(whole, "x..x....x")
    begun = after(first, "x..x")
    for name, tensor in second.state_dict().items():
        tensor.copy_(first.state_dict()[name])
    assert begun + after(second, "....x") == expected
    assert second.overflows == whole.overflows == 3
