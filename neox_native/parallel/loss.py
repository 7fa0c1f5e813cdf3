"""A head whose rows, and so a vocabulary whose columns, are cut over the tp axis. The logits are never gathered."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from neox_native.model.cross_entropy import Holder


class RanksOfVocabulary(Holder):
    """The ranks of a group, of which each holds `rows` rows of the head in rank order, the last one perhaps fewer. A softmax
    costs two all-reduces, its gradient none (Shoeybi et al. 2019 §3)."""

    def __init__(self, group: dist.ProcessGroup, rows: int):
        self.group, self.first_row = group, dist.get_rank(group) * rows

    def maximum(self, values: Tensor) -> Tensor:
        """See `Holder`."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def total(self, values: Tensor) -> Tensor:
        """See `Holder`."""
        dist.all_reduce(values, group=self.group)
        return values
