"""A hash of a tensor that does not depend on how the tensor is cut.

[Note: hash] The sum, modulo 2^64, of each element's bits times an odd weight of its place: the product of one odd 64-bit
number for each dim, mixed from the index along that dim. So the hashes of boxes that make up a tensor add up to its own,
whatever the boxes; any one element that changes changes it; and others that change with it make up for that by a chance of
2^-32 at most (many signs alone), else near 2^-64. Two tensors of one shape and type have equal hashes where they are equal bit
by bit. It finds errors, not forgers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BITS = 64
_WORDS = {1: torch.int8, 2: torch.int16}
"""By the bytes of an element; larger ones are words of 4 bytes: two signs at the top of 64 bits would cancel."""
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << BITS)
_MIX = 0xBF58476D1CE4E5B9 - (1 << BITS)
"""The golden ratio in 64 bits and a factor of splitmix64 (Steele et al. 2014), as signed numbers."""
_CHUNK = 1 << 22
"""Elements that a GPU hashes at a time: it needs 16 bytes for each."""


def tensor_hash(tensor: Tensor) -> Tensor:
    """The hash of a whole tensor, see [Note: hash], as an int64 scalar on its device; does not wait for the device."""
    return box_hash(tensor, [0] * tensor.dim())


def box_hash(box: Tensor, offsets: Sequence[int]) -> Tensor:
    """What a part of a tensor adds to the hash of the whole.

    Args:
        box: any type of whole bytes.
        offsets: where it begins in the whole tensor, along each dim.
    """
    device, parts = box.device, max(1, box.element_size() // 4)
    words = box.detach().contiguous().view(box.shape or (1,)).view(_WORDS.get(box.element_size(), torch.int32))
    starts = [*offsets[:-1], offsets[-1] * parts] if len(offsets) else [0]
    *leading, columns = [_weights(*place, device) for place in zip(starts, words.shape, range(words.dim()), strict=True)]
    rows = torch.ones(1, dtype=torch.int64, device=device)
    for weights in leading:
        rows = torch.outer(rows, weights).flatten()
    return (_row_sums(words.reshape(len(rows), len(columns)), columns) * rows).sum()


def _row_sums(matrix: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each row."""
    if matrix.is_cpu:  # on one thread, for a save in the background shall not disturb those of training
        return torch.from_numpy(np.einsum("rc,c->r", matrix.numpy(), weights.numpy()))
    pieces = matrix.split(max(1, _CHUNK // max(1, len(weights))))
    return torch.cat([(piece * weights).sum(1) for piece in pieces])


def as_text(value: int) -> str:
    """16 hexadecimal digits of a hash, or of a sum of hashes."""
    return f"{value % (1 << BITS):016x}"


def _weights(start: int, size: int, dim: int, device: torch.device) -> Tensor:
    """An odd number for each index of a range along a dim."""
    mixed = torch.arange(start + 1, start + 1 + size, device=device).add_(dim << 48).mul_(_GOLDEN)
    mixed = mixed.bitwise_xor_(mixed >> 31).mul_(_MIX)
    return mixed.bitwise_xor_(mixed >> 29).bitwise_or_(1)
