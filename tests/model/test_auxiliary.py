"""A layer's own loss changes gradients as the same loss in the sum does, and is counted once however often it is computed."""

from __future__ import annotations

import torch

from neox_native.model.auxiliary import Auxiliary, AuxiliaryLoss


def test_a_joined_loss_has_the_gradient_of_the_weighted_sum_and_counts_once() -> None:
    matrix, start = torch.randn(3, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    of_layer = lambda x: (x @ matrix).tanh().square().sum()  # noqa: E731
    expected = torch.autograd.grad((start * 2).sum() + 0.3 * of_layer(start * 2), [start, matrix])
    seam = AuxiliaryLoss("size")
    seam.sums = torch.zeros(2)
    step = Auxiliary(torch.tensor([0.3]), torch.tensor([1]))
    for _ in range(2):  # as a recomputed forward pass does
        x = start * 2
        joined = seam(x, of_layer(x), step)
    torch.testing.assert_close(torch.autograd.grad(joined.sum(), [start, matrix]), expected)
    assert seam.sums.tolist() == [0.0, of_layer(start * 2).item()]
    assert seam(x, of_layer(x), None) is x
