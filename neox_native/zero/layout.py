"""Who keeps what: the stages of ZeRO and the rows of a unit's matrix. Pure arithmetic.

[Note: rows and units] A *unit* is what is sharded together: one transformer block, the embedding, or the head with its
norm. A unit is a matrix `[W, S]` with one *row* for each of the W ranks of its group. Row r holds, parameter after
parameter, the *chunk* r of each: its dim-0 rows `r * c` to `(r + 1) * c`, where `c = ceil(rows / W)` as in
`torch.chunk`. The place of a parameter in the row is its *slot*; slots start at multiples of 16 elements. The last
chunks of a parameter may be short or empty; their slots are padded. A rank's piece of a parameter (its *shard*) is
therefore a box of whole dim-0 rows, never an arbitrary range, and any other layout can cut it again.

    reduce-scatter: sum everybody's matrix of gradients, keep my row
    all-gather:     everybody contributes a row of weights, all get the matrix

With tensor parallelism all this happens to the tp-local shard of each parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

ALIGNMENT = 16
"""Slots start at multiples of this many elements, for vector loads."""


class ZeroStage(IntEnum):
    """What is sharded over the d ranks of a unit's group (Rajbhandari et al. 2020 §5), and what a rank then holds between
    steps, in bytes per parameter, under AdamW: weights + fp32 gradients + fp32 master weights and two moments.

    Here fp32 weights are their own master in stages 0 to 2: that copy (4 or 4/d bytes) does not exist. Gradients that add up as
    integers take 8 bytes, not 4: the second summand below doubles.
    """

    NONE = 0
    """bf16 and fp16: 2 + 4 + 12 = 18. fp32: 4 + 4 + 8 = 16."""
    OPTIMIZER = 1
    """bf16 and fp16: 2 + 4 + 12/d. fp32: 4 + 4 + 8/d."""
    GRADIENTS = 2
    """bf16 and fp16: 2 + 4/d + 12/d. fp32: 4 + 4/d + 8/d. Beside it, during backward, two matrices of gradients;
    the one reduced last stays until the next backward pass."""
    PARAMETERS = 3
    """bf16 and fp16: 2/d + 4/d + 12/d = 18/d. fp32: 16/d. Beside it, the units that are in use and one ahead."""


@dataclass(frozen=True)
class Slot:
    """One parameter's place in the row."""

    shape: tuple[int, ...]
    """Shape of the parameter (its tp-local shard)."""
    chunk: int
    """dim-0 rows of a full chunk."""
    offset: int
    """First element in the row."""

    @property
    def inner(self) -> int:
        """Elements of one dim-0 row."""
        return math.prod(self.shape[1:])

    @property
    def width(self) -> int:
        """Elements of a full chunk."""
        return self.chunk * self.inner

    @property
    def num_elements(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    def span(self, rank: int) -> tuple[int, int]:
        """First and last + 1 dim-0 row that `rank` owns; equal where it owns none."""
        return min(rank * self.chunk, self.shape[0]), min((rank + 1) * self.chunk, self.shape[0])

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of `rank`'s shard."""
        start, stop = self.span(rank)
        return (stop - start, *self.shape[1:])


@dataclass(frozen=True)
class Layout:
    """The rows of one unit. See [Note: rows and units]."""

    world: int
    """W, rows of the matrix."""
    slots: tuple[Slot, ...]
    size: int
    """S, elements of a row, padding included."""


def lay_out(shapes: Sequence[tuple[int, ...]], world: int) -> Layout:
    """Lay parameters of these shapes out in `world` rows, in this order. Scalars are not supported."""
    slots, offset = [], 0
    for shape in shapes:
        assert shape and shape[0] > 0, f"cannot cut a parameter of shape {shape} along dim 0"
        slot = Slot(shape, chunk=math.ceil(shape[0] / world), offset=offset)
        slots.append(slot)
        offset += math.ceil(slot.width / ALIGNMENT) * ALIGNMENT
    return Layout(world, tuple(slots), offset)


def local_view(row: Tensor, slot: Slot, rank: int) -> Tensor:
    """`rank`'s shard of a parameter, as a view of its row."""
    shape = slot.local_shape(rank)
    return row[slot.offset : slot.offset + shape[0] * slot.inner].view(shape)
