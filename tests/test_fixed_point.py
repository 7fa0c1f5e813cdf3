"""Sums that no order changes."""

from __future__ import annotations

import math

import pytest
import torch

from neox_native import fixed_point
from neox_native.fixed_point import GRAIN, LARGEST, FixedGradients, carry, limbs, value_of

CPU = torch.device("cpu")


def summed(gradients: list[torch.Tensor], loss_scale: float | None = None, num_addends: int = 64) -> tuple[torch.Tensor, int]:
    """Their sum in fp32, as the optimizer gets it, and whether one left the range."""
    fixed = FixedGradients(num_addends, CPU)
    fixed.begin(None if loss_scale is None else torch.tensor(loss_scale))
    sums = torch.empty(gradients[0].numel(), dtype=torch.int64)
    for number, gradient in enumerate(gradients):
        fixed.collect(sums.view(gradient.shape), gradient, add=number > 0)
    fixed.settle(sums)
    return sums.view(torch.float32)[: len(sums)].clone(), int(fixed.faults())


def test_sums_of_gradients_do_not_depend_on_their_order_and_are_those_of_fp64(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, 1001, generator=generator) * 10.0 ** -(number % 7) for number in range(40)]
    found, faults = summed(gradients)
    exact = torch.stack(gradients).double().sum(dim=0).flatten()
    assert not faults and (found - exact).abs().max() <= 2.0**-24 * exact.abs().max()
    assert torch.equal(summed(gradients[::-1])[0], found)
    monkeypatch.setitem(fixed_point.PIECES, "cpu", 100)
    assert torch.equal(summed(gradients)[0], found)
    # The sums of rows that lie apart are the same.
    parts = [summed([gradient[:, columns] for gradient in gradients])[0] for columns in (slice(0, 7), slice(7, None))]
    assert torch.equal(torch.cat([part.view(3, -1) for part in parts], dim=1).flatten(), found)


@pytest.mark.parametrize("scale", [2.0**-3, 2.0**17, 3 * 2.0**20])
def test_a_loss_scale_moves_the_grain_by_its_power_of_two(scale):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(1, 64, generator=generator) * 1e-12 for _ in range(4)]
    power = 2.0 ** math.floor(math.log2(scale))
    found, faults = summed([gradient * scale for gradient in gradients], scale)
    assert not faults and torch.equal(found, summed([gradient * scale / power for gradient in gradients])[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**8 * 1.01, -(2.0**9)])
def test_what_leaves_the_range_is_a_fault_and_what_reaches_its_end_does_not_wrap(bad):
    assert summed([torch.tensor([[1.0, bad]]), torch.ones(1, 2)])[1] == 1
    largest = 2.0**8  # 2^62 grains over 64 addends
    assert 2.0**62 * GRAIN / 64 == largest
    found, faults = summed([torch.tensor([[largest, -largest]])] * 64)
    assert not faults and found.tolist() == [64 * largest, -64 * largest]


def test_limbs_add_up_in_any_order_to_what_fp64_says():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, generator=generator, dtype=torch.float64) * 10.0 ** (torch.arange(5000) % 12 - 6)
    total = limbs([values])
    assert value_of(total).item() == pytest.approx(math.fsum(values.tolist()), rel=1e-15)
    pieces = [limbs([piece]) for piece in values[torch.randperm(5000, generator=generator)].split(7)]
    assert torch.equal(carry(torch.stack(pieces).sum(dim=0)), total)
    small = values.float() / 1e3
    squares = limbs([small], squared=True)
    assert value_of(squares).item() == pytest.approx(math.fsum(value * value for value in small.tolist()), rel=1e-15)
    assert torch.equal(limbs([*values.split([1, 2999, 0, 2000]), values[:0]], piece=64), total)
    assert not limbs([values[:0]]).any()
    assert torch.equal(value_of(torch.stack([total, squares])), torch.stack([value_of(total), value_of(squares)]))


def test_a_sum_of_limbs_has_no_range_that_it_could_leave():
    """The squared norm of a gradient whose elements are in range, but which has many."""
    elements = torch.tensor([2.0**13]).expand(1 << 22)
    assert value_of(limbs([elements], squared=True)).item() == 2.0**48
    most = torch.tensor([2.0**12, -(2.0**-58)], dtype=torch.float64)
    assert value_of(limbs([most]) * (1 << 20)).item() == 2.0**32 - 2.0**-38
    assert value_of(limbs([-most[:1]]) * (1 << 20)).item() == -(2.0**32)
    assert value_of(limbs([most[1:]])).item() == -(2.0**-58), "what is small and negative is exact"


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2 * LARGEST, -2 * LARGEST])
def test_limbs_of_what_does_not_fit_are_not_a_number(bad):
    assert value_of(limbs([torch.tensor([1.0, bad])]) + limbs([torch.ones(3)])).isnan()
    assert value_of(limbs([torch.tensor([LARGEST, -LARGEST / 2])])).item() == LARGEST / 2
