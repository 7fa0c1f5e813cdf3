"""Activation checkpointing: keep a block's input, recompute the rest in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

from torch.utils.checkpoint import checkpoint

from neox_native.model.layers import Block


def recompute(block: Block, has_dropout: bool) -> None:
    """Make a block forget its activations. Costs one more forward pass, in all 4/3 of the FLOPs.

    `forward` is replaced, not wrapped in a module, so that parameter names and hooks stay where they are. Saving the
    random state costs a device sync on a GPU, so only dropout asks for it.
    """
    forward = block.forward
    block.forward = lambda x, context: checkpoint(
        forward, x, context, use_reentrant=False, preserve_rng_state=has_dropout
    )
