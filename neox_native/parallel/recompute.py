"""Activation checkpointing: keep a block's input, recompute the rest in the backward pass (Chen et al. 2016).

[Note: recomputing once] A zero-bubble schedule takes the backward pass of a block apart: one call of autograd for the
gradient of its input, and one for each group of its parameters. torch's `checkpoint` recomputes in each of these calls,
seven times in all for a block of ours, and its `GraphExecGroup` refuses calls that need the same activation. So
`recompute_once` hands autograd empty holders; the first that is opened recomputes the block and fills them all, and each
frees its activation when autograd is done with it: from the input half to the weight half a block keeps what it would
keep without recomputation, and before that its input alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from neox_native.model.block import Block
from neox_native.model.positions import Context


def recompute(block: Block, split: bool = False) -> None:
    """Make a block forget its activations. Costs one more forward pass, in all 4/3 of the FLOPs.

    `forward` is replaced, not wrapped in a module, so that parameter names and hooks stay where they are. Dropout draws the
    same masks again by the context's seed, see [Note: masks]; no random state is kept.

    Args:
        split: the schedule splits backward passes. See [Note: recomputing once].
    """
    forward = block.forward
    if split:
        block.forward = lambda x, context: recompute_once(forward, x, context)
    else:
        block.forward = lambda x, context: checkpoint(forward, x, context, use_reentrant=False, preserve_rng_state=False)


class _Holder:
    """Stands for an activation in the graph."""

    activation: Tensor | None = None


class _Filled(Exception):
    """All holders are filled: what is left of the forward pass is not needed."""


def recompute_once(forward: Callable[[Tensor, Context], Tensor], x_BTD: Tensor, context: Context) -> Tensor:
    """`forward(x_BTD, context)`, which is run again once when autograd first asks for an activation."""
    holders: list[weakref.ref[_Holder]] = []
    input_BTD = x_BTD.detach().requires_grad_(x_BTD.requires_grad)

    def pack(_activation: Tensor) -> _Holder:
        holder = _Holder()
        holders.append(weakref.ref(holder))
        return holder

    def again() -> None:
        filled = 0

        def fill(activation: Tensor) -> Tensor:
            nonlocal filled
            if (holder := holders[filled]()) is not None:
                holder.activation = activation.detach()
            filled += 1
            if filled == len(holders):
                raise _Filled
            return activation.detach()  # an output that its own graph kept would never be freed

        try:
            with torch.enable_grad(), saved_tensors_hooks(fill, lambda activation: activation):
                forward(input_BTD, context)
        except _Filled:
            pass

    def unpack(holder: _Holder) -> Tensor:
        if holder.activation is None:
            again()
        assert holder.activation is not None, "the block saved other activations when it was recomputed"
        return holder.activation

    with saved_tensors_hooks(pack, unpack):
        return forward(x_BTD, context)
