"""Head and cross-entropy in one, slice by slice of a microbatch's tokens: at no time are there logits of all of them.

Shapes: B microbatch, T sequence, N = B * T tokens, n tokens of a slice, D hidden, V rows of the head's matrix that are here.

[Note: slices] A slice's logits, the softmax over them and its gradient live in one fp32 tensor [n, V]. As soon as it is there, it
is multiplied into the gradients of the head's input and of its matrix, which are summed over slices in fp32, and forgotten: the
three products of a head, n / N of the memory. The forward pass can do this only for the sum of the values. So it does, and
the backward pass multiplies what it kept by the one number that an objective of that sort sends back: autograd hands that on as an
expanded scalar. Where another gradient arrives, or the forward pass was told to keep no gradient, the slices run again in the
backward pass, at the cost of a fourth product; from the first such gradient on, the forward pass leaves it to that.
A slice has a fixed number of tokens, so that its sums are the same in every layout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from neox_native.config.schema import Training
from neox_native.model import compiled_loss
from neox_native.model.compiled_loss import compiled

IGNORED = -100
"""Target of a position that does not count."""
FP16_UNIT = 2.0**10
"""Gradient of a value in fp16 before the backward pass is known: probabilities of 1e-10 do not flush to zero, and the gradient
of the head's input stays in range while no weight exceeds 32."""


class Holder:
    """Who has rows of the head's matrix, as a softmax must know: one holder with all of them."""

    first_row = 0
    """The token id of the first row here."""

    def maximum(self, values: Tensor) -> Tensor:
        """The largest over all holders, element by element."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """The sum over all holders."""
        return values


class Softmax(NamedTuple):
    """What the holders of the logits' columns find out together, in fp32."""

    exponentials: Tensor
    """[..., V]: e to the power of the logits here, each less its token's largest one."""
    total: Tensor
    """[...]: their sum over the whole vocabulary."""
    target: Tensor
    """[...]: the target's logit less the largest one: 0 where the target is the most probable token."""
    column: Tensor
    """[...]: the target's column here; 0 where it lies elsewhere."""
    elsewhere: Tensor
    """[...]: whether another holder has the target's column."""


def softmax(logits: Tensor, targets: Tensor, holder: Holder) -> Softmax:
    """The parts of a softmax over fp32 logits [..., V], which it overwrites, and token ids [...]."""
    logits.sub_(holder.maximum(logits.amax(dim=-1))[..., None])
    column = targets - holder.first_row
    elsewhere = (column < 0) | (column >= logits.shape[-1])
    column = column.masked_fill(elsewhere, 0)
    target = logits.gather(-1, column[..., None]).squeeze(-1).masked_fill(elsewhere, 0.0)
    exponentials = logits.exp_()
    total, target = holder.total(torch.stack([exponentials.sum(dim=-1), target]))
    return Softmax(exponentials, total, target, column, elsewhere)


class CrossEntropy(nn.Module):
    """Negative log-likelihood of each target [nats] from the head's input and matrix; a seam, see [Note: seams] and
    [Note: slices]."""

    def __init__(self) -> None:
        super().__init__()
        self.slice_tokens = Training.loss_slice_tokens
        """n."""
        self.holder = Holder()
        self.early = True
        """Whether the forward pass makes gradients: an fp32 copy of the matrix for each microbatch between its passes."""
        self.split = False
        """Whether a backward pass comes in two halves, which both ask for all gradients."""
        self.compiled = False
        """Whether kernels are compiled; see [Note: compiled loss]."""

    def forward(self, x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
        """[B, T, D], [V, D] and token ids [B, T] -> fp32 [B, T]; 0 where the target is -100."""
        return _SlicedCrossEntropy.apply(x_BTD, weight_VD, targets_BT, self, torch.is_grad_enabled())


class _Swept(NamedTuple):
    """What one run over all slices gives; gradients in fp32, None where nobody asked."""

    values: Tensor
    x: Tensor | None
    weight: Tensor | None


def _sweep(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, how: CrossEntropy, wanted: tuple[bool, bool], gradient_N: Tensor | float
) -> _Swept:
    """Run over the slices.

    Args:
        wanted: whether to make gradients of x and of the weight.
        gradient_N: what arrives from behind for each value.
    """
    swept = _Swept(
        torch.empty(len(x_ND), dtype=torch.float32, device=x_ND.device),
        torch.empty_like(x_ND, dtype=torch.float32) if wanted[0] else None,
        torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None,
    )
    for start in range(0, len(x_ND), how.slice_tokens):
        n = slice(start, start + how.slice_tokens)
        arrives = gradient_N if isinstance(gradient_N, float) else gradient_N[n]
        of_slice = _Swept(swept.values[n], None if swept.x is None else swept.x[n], swept.weight)
        run = _run_compiled_slice if how.compiled else _run_slice
        run(x_ND[n], weight_VD, targets_N[n], how.holder, arrives, of_slice)
    return swept


def _run_slice(x: Tensor, weight_VD: Tensor, targets: Tensor, holder: Holder, arrives: Tensor | float, into: _Swept) -> None:
    """Fill in a slice's values and the gradient of its x, and add to that of the weight. A call of its own, so that the next slice
    finds its memory free."""
    counts = targets != IGNORED
    found = softmax((x @ weight_VD.T).float(), targets.masked_fill(~counts, 0), holder)
    torch.sub(found.total.log(), found.target, out=into.values).masked_fill_(~counts, 0.0)
    if into.x is None and into.weight is None:
        return
    gradient = _logit_gradient(found, counts * arrives)
    _add_products(into, gradient, gradient.to(x.dtype), x, weight_VD)


def _run_compiled_slice(
    x: Tensor, weight_VD: Tensor, targets: Tensor, holder: Holder, arrives: Tensor | float, into: _Swept
) -> None:
    """`_run_slice`, equal to it to rounding."""
    counts, logits, columns = targets != IGNORED, x @ weight_VD.T, targets - holder.first_row
    largest = holder.maximum(compiled(compiled_loss.largest)(logits))
    total, target = holder.total(compiled(compiled_loss.sums)(logits, largest, columns))
    torch.sub(total.log(), target, out=into.values).masked_fill_(~counts, 0.0)
    if into.x is None and into.weight is None:
        return
    compiled(compiled_loss.overwrite_with_gradient)(logits, largest, total, columns, counts * arrives)
    _add_products(into, logits, logits, x, weight_VD)


def _logit_gradient(found: Softmax, factor_n: Tensor) -> Tensor:
    """(softmax - one-hot) * factor, in the exponentials' memory."""
    target = found.exponentials.gather(-1, found.column[:, None])
    less_one = target - (found.total * ~found.elsewhere)[:, None]
    return found.exponentials.scatter_(-1, found.column[:, None], less_one).mul_((factor_n / found.total)[:, None])


def _add_products(into: _Swept, gradient_nV: Tensor, rounded_nV: Tensor, x_nD: Tensor, weight_VD: Tensor) -> None:
    if into.x is not None:
        into.x.copy_(rounded_nV @ weight_VD)
    if into.weight is not None:
        _add_product(into.weight, gradient_nV, rounded_nV, x_nD)


def _add_product(sum_VD: Tensor, gradient_nV: Tensor, rounded_nV: Tensor, x_nD: Tensor) -> None:
    """Add gradient^T x in fp32. In bf16 a slice's product is rounded, as the whole is at the end; fp16's range is too small."""
    if x_nD.dtype == torch.bfloat16:
        sum_VD += rounded_nV.T @ x_nD
    elif x_nD.dtype == torch.float16 and x_nD.is_cuda:
        sum_VD += torch.mm(rounded_nV.T, x_nD, out_dtype=torch.float32)
    else:
        torch.addmm(sum_VD, gradient_nV.float().T, x_nD.float(), out=sum_VD)


class _SlicedCrossEntropy(torch.autograd.Function):
    """See [Note: slices]."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, how: CrossEntropy, recorded: bool) -> Tensor:
        ctx.save_for_backward(x_BTD, weight_VD, targets_BT)
        ctx.how, ctx.wanted, ctx.made, ctx.finished = how, ctx.needs_input_grad[:2], None, None
        ctx.unit = FP16_UNIT if x_BTD.dtype == torch.float16 else 1.0
        early = recorded and how.early
        wanted = ctx.wanted if early else (False, False)
        values, *made = _sweep(x_BTD.flatten(0, 1), weight_VD, targets_BT.flatten(), how, wanted, ctx.unit)
        if early:
            ctx.made = made
        return values.view_as(targets_BT)

    @staticmethod
    def backward(ctx: Any, gradient_BT: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, weight_VD, targets_BT = ctx.saved_tensors
        finished, ctx.finished = ctx.finished, None
        if finished is None:
            made, ctx.made = ctx.made, None
            even = not any(gradient_BT.stride())
            ctx.how.early &= even
            if made is None or not even:
                arrives = ctx.unit if even else gradient_BT.flatten()
                del made
                _, *made = _sweep(x_BTD.flatten(0, 1), weight_VD, targets_BT.flatten(), ctx.how, ctx.wanted, arrives)
            finished = []
            while made:  # in place, and one after the other: the weight's is large
                gradient = made.pop(0)
                if gradient is not None and even:
                    gradient = gradient.mul_(gradient_BT[0, 0] / ctx.unit)
                finished.append(gradient)
            finished = [
                None if made_of is None else made_of.to(like.dtype).view_as(like) for made_of, like in zip(finished, (x_BTD, weight_VD))
            ]
            ctx.finished = finished if ctx.how.split else None
        return *finished, None, None, None
