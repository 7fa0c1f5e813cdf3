"""Head and loss in slices against all logits at once: values, gradients, memory, operations."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from neox_native.model.cross_entropy import CrossEntropy
from neox_native.plan.ledger import Ledger
from tests.ranks import run_ranks

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
B, T, D, V = 3, 50, 16, 97


def sliced(slice_tokens: int = 64, early: bool = True) -> CrossEntropy:
    loss = CrossEntropy()
    loss.slice_tokens, loss.early = slice_tokens, early
    return loss


def unsliced(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As the readout was: all logits, in fp32."""
    logits = F.linear(x, weight).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)


def gradients(loss: Loss, weighting: Tensor | float, dtype: torch.dtype = torch.float32, frozen: bool = False) -> list[Tensor | None]:
    """Values and gradients of a microbatch, a third of whose first row is masked."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, D, generator=draw).to(dtype).clone().requires_grad_()
    weight = torch.randn(V, D, generator=draw).mul(0.3).to(dtype).clone().requires_grad_(not frozen)
    targets = torch.randint(0, V, (B, T), generator=draw)
    targets[0, ::3] = -100
    values = loss(x, weight, targets)
    (values.sum() * weighting if isinstance(weighting, float) else (values * weighting).sum()).backward()
    return [values.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)], ids=str)
@pytest.mark.parametrize("weighting", ["one for all", "one for each"])
@pytest.mark.parametrize("slice_tokens, early", [(64, True), (64, False), (1000, True)])
def test_slices_are_the_whole_to_rounding(slice_tokens, early, weighting, dtype, tolerance):
    factor = 0.3 if weighting == "one for all" else torch.rand(B, T, generator=torch.Generator().manual_seed(1))
    found, expected = gradients(sliced(slice_tokens, early), factor, dtype), gradients(unsliced, factor, dtype)
    for mine, whole in zip(found, expected):
        assert mine.dtype == whole.dtype and mine.shape == whole.shape
        assert (mine.float() - whole.float()).norm() <= tolerance * whole.float().norm()
    assert (found[0][0, ::3] == 0).all() and (found[1][0, ::3] == 0).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)], ids=str)
@pytest.mark.parametrize("early", [True, False])
def test_what_is_compiled_is_the_same_to_rounding(early, dtype, tolerance):
    """Its functions uncompiled; `tests/train/test_layouts.py` compiles them, on ranks that share the vocabulary."""
    loss = sliced(early=early)
    loss.compiled = True
    with torch.compiler.set_stance("force_eager"):
        found = gradients(loss, torch.rand(B, T, generator=torch.Generator().manual_seed(1)), dtype)
        alike = gradients(loss, 0.3, dtype)
    for mine, factor in ((found, torch.rand(B, T, generator=torch.Generator().manual_seed(1))), (alike, 0.3)):
        for one, other in zip(mine, gradients(sliced(), factor, dtype)):
            assert one.dtype == other.dtype and (one.float() - other.float()).norm() <= tolerance * other.float().norm()


def test_gradients_of_the_forward_pass_are_bit_by_bit_those_of_the_backward_pass():
    early, late = (gradients(sliced(early=early), 0.3) for early in (True, False))
    assert all(torch.equal(mine, other) for mine, other in zip(early, late))


def test_a_frozen_head_gets_no_gradient():
    _, x, weight = gradients(sliced(), 0.3, frozen=True)
    assert weight is None and torch.equal(x, gradients(sliced(), 0.3)[1])


def test_small_probabilities_do_not_flush_to_zero_in_fp16():
    """Those of all tokens but the target are 2e-9: alone too small for fp16, together all of the gradient."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.cat([torch.randn(1000, 8, generator=draw).mul(0.1), torch.full((1000, 1), -10.0)], dim=1)
    weight[0, -1] = 10.0
    x, targets = torch.eye(9)[8].view(1, 1, 9), torch.zeros(1, 1, dtype=torch.int64)
    found = []
    for dtype, loss in ((torch.float16, sliced()), (torch.float32, unsliced)):
        read = x.to(dtype).clone().requires_grad_()
        (loss(read, weight.to(dtype), targets).sum() * 2**16).backward()
        found.append(read.grad.float())
    torch.testing.assert_close(*found, rtol=0.05, atol=0.01 * found[1].abs().max().item())


def peak_and_flops(loss: Loss, vocabulary: int, times: int = 1, weighting: float | None = 0.5) -> tuple[int, int]:
    """Most bytes beyond a head's input and matrix in forward and backward passes over 2,048 tokens, and the FLOPs of the last."""
    x, weight = torch.zeros(1, 2048, 256, requires_grad=True), torch.zeros(vocabulary, 256, requires_grad=True)
    targets, factors = torch.zeros(1, 2048, dtype=torch.int64), torch.ones(1, 2048)
    for _ in range(times):
        x.grad = weight.grad = None
        ledger = Ledger({})
        ledger.claim([x, weight, targets, factors], "parameters")
        with ledger:
            values = loss(x, weight, targets)
            (values.sum() * weighting if weighting else (values * factors).sum()).backward()
            del values
    return max(peak.by_kind["activations"] for peak in ledger.peaks().values()), ledger.totals.flops


def test_the_loss_needs_a_fifth_of_the_memory():
    with FakeTensorMode():
        (whole, flops), (mine, same) = peak_and_flops(unsliced, 50304), peak_and_flops(CrossEntropy(), 50304)
    assert whole >= 3 * 4 * 2048 * 50304 and mine <= whole / 5
    assert flops == same == 3 * 2 * 2048 * 256 * 50304


@pytest.mark.slow
def test_the_loss_needs_a_fifth_of_the_memory_of_a_process():
    def grown(loss: Loss) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak_and_flops(loss, 50304)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    resident = 2 * 4 * (2048 + 50304) * 256 // 1024  # x, weight: neither's is the loss' [KiB]
    whole, mine = (run_ranks(1, grown, loss)[0] - resident // 2 for loss in (unsliced, CrossEntropy()))
    assert mine <= whole / 5, (mine, whole)


def test_the_slices_run_twice_only_where_the_backward_pass_must_know():
    product = 2 * 2048 * 256 * 1000
    with FakeTensorMode():
        assert peak_and_flops(sliced(early=False), 1000)[1] == 4 * product
        loss = sliced()
        assert peak_and_flops(loss, 1000, times=1, weighting=None)[1] == 6 * product  # it could not know
        assert peak_and_flops(loss, 1000, times=1, weighting=None)[1] == 4 * product
        with torch.no_grad():
            ledger = Ledger({})
            with ledger:
                loss(torch.zeros(1, 2048, 256), torch.zeros(1000, 256), torch.zeros(1, 2048, dtype=torch.int64))
            assert ledger.totals.flops == product
