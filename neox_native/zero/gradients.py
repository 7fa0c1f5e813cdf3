"""One unit's gradients: from autograd into a matrix, summed over the unit's group, into this rank's fp32 row.

[Note: accumulation] As soon as autograd has finished a parameter's gradient, a hook copies it into the unit's fp32
matrix (the first microbatch) or adds it (the others) and drops it: the copy-in that the collective needs is the fp32
accumulation that low precision needs. Stages 0 and 1 keep the matrix and reduce it once, in the last backward pass of
the step; the result lies in my own row. Stages 2 and 3 reduce in every backward pass into a row of their own and free
the matrix. Where ZeRO shards inside groups, a rank's row is then summed over its replicas in the other groups, once a step and
beside the backward pass, as soon as the last reduction has filled it. Stage 0 is the same with one row, the whole parameter:
only its all-reduce over replicas is left.

With `FixedGradients` the matrix holds integers, whose sum no order changes, until `settle` turns this rank's row into fp32.

Gradients are summed, never averaged: the loss is already divided by the tokens of the whole step. After a step the rows
hold the gradient that was applied, until the next training forward makes use of their memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from neox_native.fixed_point import FixedGradients
from neox_native.zero import collectives
from neox_native.zero.layout import Layout, Slot, local_view
from neox_native.zero.spec import ParameterSpec, local_gradient

MANY = 1 << 30
"""More reductions than a step has."""


class GradientSum:
    """The sum of one unit's gradients, over microbatches and ranks. See [Note: accumulation].

    Args:
        specs: its trainable parameters.
        layout: their places in the rows.
        group: the ranks over which gradients are summed; they hold a row each.
        replicas: those that hold the same row, over which it is summed, too; None where there are no others.
        keeps_matrix: whether the gradients of a whole step are collected before they are reduced; else those of each
            backward pass.
        device: where everything lives.
        fixed: adds gradients up as integers; without it they are added in fp32.
    """

    def __init__(
        self,
        specs: Sequence[ParameterSpec],
        layout: Layout,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        keeps_matrix: bool,
        device: torch.device,
        fixed: FixedGradients | None,
    ):
        self.specs, self.layout, self.group, self.keeps_matrix = specs, layout, group, keeps_matrix
        self.replicas, self.device, self.fixed = replicas, device, fixed
        self.rank = dist.get_rank(group) if layout.world > 1 else 0
        self.dtype = torch.float32 if fixed is None else torch.int64
        self.places: list[list[Tensor]] = []
        """Where each parameter's gradient goes in the matrix, part after part."""
        self.matrix: Tensor | None = self._new_matrix() if keeps_matrix else None
        apart = self.matrix is None
        self.row = torch.zeros(layout.size, dtype=self.dtype, device=device) if apart else self.matrix[self.rank]
        """This rank's part of the sum."""
        self.sums = [local_view(self.row, slot, self.rank) for slot in layout.slots]
        """This rank's shard of each parameter's gradient while it is summed."""
        row = self.row if fixed is None else self.row.view(torch.float32)[: layout.size]
        self.shards = [local_view(row, slot, self.rank) for slot in layout.slots]
        """The same in fp32, once it is settled."""
        self.filled: set[int] = set()
        """Parameters that have contributed to the matrix."""
        self.readers = [len(spec.parameters) for spec in specs]
        self.missing, self.num_missing = [0] * len(specs), 0
        """For each parameter, and in all, how many gradients the current backward pass has yet to deliver: one for each reader."""
        # In stages 2 and 3 one matrix is filled while another is reduced. Pairwise exchanges need memory of their own, and sums over
        # replicas begin when the reduction before them has finished.
        bounded = layout.world > 1 and (collectives.pairwise(group) or replicas is not None)
        self.max_in_flight = 1 if not keeps_matrix else 2 if bounded else MANY
        """Reductions of which so many may be under way at a time."""
        self.reducing = False
        self.reduction: collectives.Handle | None = None
        self.num_reductions = 0
        """Reductions in this step."""
        self.is_last = False
        """Whether no other of this step follows the newest one."""
        self.summing: collectives.Handle | None = None
        """The sum of the row over the replicas."""
        self.waiting: collectives.Waiting = nullcontext

    def begin(self) -> None:
        """A backward pass begins."""
        self.missing, self.num_missing = list(self.readers), sum(self.readers)

    def arrive(self, position: int) -> bool:
        """Autograd has finished a gradient of one parameter. Returns whether the current backward pass will deliver no other."""
        self.missing[position] -= 1
        self.num_missing -= 1
        return not self.missing[position]

    @property
    def complete(self) -> bool:
        """Whether the current backward pass has delivered every gradient."""
        return not self.num_missing

    def take(self, position: int) -> None:
        """Copy or add the whole gradients that lie in a parameter's `.grad`, if there are any, into the matrix."""
        for parameter in self.specs[position].parameters:
            if parameter.grad is not None:
                self._take(position, parameter)

    def _take(self, position: int, parameter: nn.Parameter) -> None:
        self.finish()  # the matrix is wanted again
        assert self.num_reductions == 0 or not self.keeps_matrix, "the step's reduction has begun"
        if self.matrix is None:
            self.matrix = self._new_matrix()
        gradient, places, add = local_gradient(self.specs[position], parameter.grad), self.places[position], position in self.filled
        if len(places) == 1:
            self._put(places[0], gradient.reshape(places[0].shape), add)
        else:
            for place, piece in zip(places, gradient.flatten().split([place.numel() for place in places])):
                self._put(place, piece.view(place.shape), add)
        self.filled.add(position)
        parameter.grad = None

    def _put(self, place: Tensor, gradient: Tensor, add: bool) -> None:
        if self.fixed is None:
            (place.add_ if add else place.copy_)(gradient)  # both convert to fp32
        else:
            self.fixed.collect(place, gradient, add)

    def start(self, last: bool) -> None:
        """Sum the matrix over the group, or in stage 0 over the replicas; parameters that received no gradient count as zero.

        Args:
            last: the step's last backward pass has begun.
        """
        if self.matrix is None:
            self.matrix = self._new_matrix()
        for position, slot in enumerate(self.layout.slots):
            if position not in self.filled:
                self.matrix[:, slot.offset : slot.offset + slot.width].zero_()
        output = self.row
        if not self.keeps_matrix:
            output.untyped_storage().resize_(output.numel() * output.element_size())
            output = output if self.num_reductions == 0 else self.matrix[self.rank]
        if self.layout.world > 1:
            self.reduction = collectives.reduce_scatter(output, self.matrix.view(-1), self.group)
        elif self.replicas is not None:
            self.reduction = collectives.all_reduce(output, self.replicas)
        self.num_reductions += 1
        self.reducing, self.is_last = True, last

    def finish(self) -> None:
        """Make the result visible to the compute stream; in stages 2 and 3 add it to the row and free the matrix. Behind the
        step's last reduction, begin to sum the row over the replicas."""
        if not self.reducing:
            return
        self.reducing = False
        if self.reduction is not None:
            with self.waiting():
                self.reduction.wait()
            self.reduction = None
        if not self.keeps_matrix:
            assert self.matrix is not None
            if self.num_reductions > 1:
                self.row.add_(self.matrix[self.rank])
            self.matrix, self.places = None, []
        self.filled.clear()
        if self.is_last:
            self._sum_over_replicas()

    def close(self) -> None:
        """All reductions of the step have finished: make the sum over the replicas visible to the compute stream."""
        if not self.is_last:  # nobody could tell
            self._sum_over_replicas()
        if self.summing is not None:
            with self.waiting():
                self.summing.wait()
        self.summing, self.is_last, self.num_reductions = None, False, 0

    def _sum_over_replicas(self) -> None:
        if self.layout.world > 1 and self.replicas is not None:
            self.summing = collectives.all_reduce(self.row, self.replicas)

    def forget(self) -> None:
        """A training forward begins. If it is the step's first, stages 2 and 3 free the last step's gradient; its row comes
        back with the first reduction."""
        if not self.keeps_matrix and self.num_reductions == 0:
            self.row.untyped_storage().resize_(0)

    def settle(self) -> None:
        """All sums are complete: `shards` become valid, and `sums` invalid where they are integers."""
        if self.fixed is not None:
            self.fixed.settle(self.row)

    def _new_matrix(self) -> Tensor:
        layout = self.layout
        matrix = torch.empty(layout.world, layout.size, dtype=self.dtype, device=self.device)
        self.places = [_places(matrix, slot) for slot in layout.slots]
        return matrix


def _places(matrix: Tensor, slot: Slot) -> list[Tensor]:
    """A parameter's full chunks as [ranks, width], and the short chunk after them, if there is one, as [1, its width]."""
    num_full = slot.shape[0] // slot.chunk
    places = [matrix[:num_full, slot.offset : slot.offset + slot.width]]
    if rest := slot.shape[0] % slot.chunk:
        places.append(matrix[num_full : num_full + 1, slot.offset : slot.offset + rest * slot.inner])
    return places
