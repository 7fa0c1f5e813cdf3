"""One unit's matrix of gradients, and the order in which matrices are reduced.

[Note: accumulation] As soon as autograd has finished a parameter's gradient, a hook copies it into the unit's fp32
matrix (the first microbatch) or adds it (the others) and drops it: the copy-in that the collective needs is the fp32
accumulation that low precision needs. Stages 0 and 1 keep the matrix and reduce it once, in the last backward pass of
the step; the result lies in my own row. Stages 2 and 3 reduce in every backward pass into a row of their own and free
the matrix. Stage 0 is the same with one row, the whole parameter, and an all-reduce.

Gradients are summed, never averaged: the loss is already divided by the tokens of the whole step. After a step the rows
hold the gradient that was applied, until the next training forward makes use of their memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from neox_native.zero import collectives
from neox_native.zero.layout import Layout, Slot, ZeroStage


class GradientBucket:
    """The matrix `[W, S]` of one unit's gradients. See [Note: rows and units] and [Note: accumulation]."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup, stage: ZeroStage, device: torch.device):
        self.layout, self.group, self.stage, self.device = layout, group, stage, device
        self.rank = dist.get_rank(group) if stage else 0
        self.keeps_matrix = stage <= ZeroStage.OPTIMIZER
        self.places: list[tuple[Tensor, Tensor | None]] = []
        """Where each parameter's gradient goes in the matrix."""
        self.matrix: Tensor | None = self._new_matrix() if self.keeps_matrix else None
        self.row = self._my_row(self.matrix) if self.keeps_matrix else torch.zeros(layout.size, device=device)
        self.shards = [local_view(self.row, slot, self.rank) for slot in layout.slots]
        self.filled: set[int] = set()
        """Parameters that have contributed to the matrix."""
        self.arrived: set[int] = set()
        """Parameters whose gradient the current backward pass has delivered."""
        self.work: collectives.Handle | None = None
        self.waiting: collectives.Waiting = nullcontext
        self.num_reductions = 0
        """Reductions in this step."""

    @property
    def complete(self) -> bool:
        """Whether the current backward pass has delivered every gradient."""
        return len(self.arrived) == len(self.layout.slots)

    def forget(self) -> None:
        """Stages 2 and 3: free the last step's gradient; the row comes back with the first reduction."""
        self.row.untyped_storage().resize_(0)

    def accumulate(self, index: int, gradient: Tensor) -> None:
        """Copy or add the whole gradient of parameter `index` into the matrix."""
        assert self.work is None and (self.num_reductions == 0 or not self.keeps_matrix), "the reduction has begun"
        if self.matrix is None:
            self.matrix = self._new_matrix()
        full, short = self.places[index]
        put = Tensor.add_ if index in self.filled else Tensor.copy_  # both convert to fp32
        self.filled.add(index)
        if short is None:
            put(full, gradient.reshape(full.shape))
        else:
            body, tail = gradient.split([len(gradient) - len(short), len(short)])
            put(full, body.reshape(full.shape))
            put(short, tail)

    def start_reduction(self) -> None:
        """Sum the matrix over the dp axis; parameters that received no gradient count as zero."""
        if self.matrix is None:
            self.matrix = self._new_matrix()
        for index, slot in enumerate(self.layout.slots):
            if index not in self.filled:
                self.matrix[:, slot.offset : slot.offset + slot.width].zero_()
        output = self.row
        if not self.keeps_matrix:
            self.row.untyped_storage().resize_(self.row.numel() * self.row.element_size())
            output = self.row if self.num_reductions == 0 else self._my_row(self.matrix)
        if self.stage:
            self.work = collectives.reduce_scatter(output, self.matrix.view(-1), self.group)
        elif dist.get_world_size(self.group) > 1:
            self.work = collectives.all_reduce(output, self.group)
        self.num_reductions += 1

    def finish_reduction(self) -> None:
        """Make the result visible to the compute stream; in stages 2 and 3 add it to the row and free the matrix."""
        if self.work is not None:
            with self.waiting():
                self.work.wait()
            self.work = None
        if not self.keeps_matrix:
            assert self.matrix is not None
            if self.num_reductions > 1:
                self.row.add_(self._my_row(self.matrix))
            self.matrix, self.places = None, []
        self.filled.clear()

    def _new_matrix(self) -> Tensor:
        matrix = torch.empty(self.layout.world, self.layout.size, dtype=torch.float32, device=self.device)
        self.places = [_places(matrix, slot) for slot in self.layout.slots]
        return matrix

    def _my_row(self, matrix: Tensor) -> Tensor:
        return matrix[self.rank]


class Reducer:
    """Reduces the buckets of one pipeline stage while backward runs, last unit first and always in that order: a rank
    on which a parameter happens to receive no gradient must not reduce another bucket than its peers."""

    def __init__(self, buckets: Sequence[GradientBucket], stage: ZeroStage):
        self.order = [bucket for bucket in reversed(buckets) if bucket.layout.slots]
        self.every_microbatch = stage >= ZeroStage.GRADIENTS
        # Two matrices at a time: one is filled while the other is reduced.
        self.max_in_flight = 1 if self.every_microbatch else 2
        self.in_flight: deque[GradientBucket] = deque()
        self.next = 0
        """Position in `order` of the next bucket to reduce."""
        self.num_backwards = 0
        """Backward passes that were announced in this step."""
        self.reducing = False
        """Whether the current backward pass reduces what is complete."""
        self.watching = False
        """Whether the end of the current backward pass will be noticed."""

    def forget(self) -> None:
        """A training forward begins: if it is the step's first, old gradients make room for its activations."""
        if self.every_microbatch and self.num_backwards == 0:
            for bucket in self.order:
                bucket.forget()

    def begin(self, last: bool) -> None:
        """A backward pass begins; `last` if it is the step's last."""
        if self.every_microbatch:
            if self.num_backwards:
                self._flush()  # in case no gradient arrived at all
            self.next = 0
        for bucket in self.order:
            bucket.arrived.clear()
        self.num_backwards += 1
        self.reducing, self.watching = last or self.every_microbatch, False

    def notice(self) -> None:
        """A gradient has arrived: reduce what is complete and next."""
        if self.reducing and not self.watching:
            self.watching = True
            at_end_of_backward(self._end)
        while self.reducing and self.next < len(self.order) and self.order[self.next].complete:
            self._reduce_next()

    def settle(self, bucket: GradientBucket) -> None:
        """A bucket's matrix is wanted again: wait for its reduction."""
        while bucket in self.in_flight:
            self.in_flight.popleft().finish_reduction()

    def finish(self) -> None:
        """The step's backward passes are over: reduce the rest and wait for the results."""
        self._flush()
        while self.in_flight:
            self.in_flight.popleft().finish_reduction()
        for bucket in self.order:
            bucket.num_reductions = 0
        self.next = self.num_backwards = 0
        self.reducing = False

    def _end(self) -> None:
        """The backward pass is over: what it left incomplete is reduced now, at the same point on every rank."""
        self.watching = False
        self._flush()

    def _flush(self) -> None:
        while self.next < len(self.order):
            self._reduce_next()

    def _reduce_next(self) -> None:
        if len(self.in_flight) == self.max_in_flight:
            self.in_flight.popleft().finish_reduction()
        bucket = self.order[self.next]
        bucket.start_reduction()
        self.in_flight.append(bucket)
        self.next += 1


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call `function` when the current backward pass is over."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def local_view(row: Tensor, slot: Slot, rank: int) -> Tensor:
    """`rank`'s shard of a parameter, as a view of its row."""
    shape = slot.local_shape(rank)
    return row[slot.offset : slot.offset + shape[0] * slot.inner].view(shape)


def _places(matrix: Tensor, slot: Slot) -> tuple[Tensor, Tensor | None]:
    """A parameter's full chunks as [ranks, width], and the short chunk after them, if there is one, as its rows."""
    num_full = slot.shape[0] // slot.chunk
    full = matrix[:num_full, slot.offset : slot.offset + slot.width]
    return full, local_view(matrix[num_full], slot, num_full) if slot.shape[0] % slot.chunk else None
