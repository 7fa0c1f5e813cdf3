"""Keys and values of the positions that a model has seen, so that a later token costs one position.

Shapes: B rows, T new tokens of each row, K key/value heads (this model's share of them), S positions, H head dim.

[Note: cache] Every row counts its positions from 0, at the left end of its buffer; shorter prompts are padded on the
right. What a pad writes lies beyond its row's end: the mask hides it, and the row's own later tokens overwrite it. So
a row of a batch computes what it would compute alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Cache:
    """Static buffers of all layers of a model, or of a part of one, and where the next tokens go.

    Args:
        capacity: positions that a row can hold [tokens].
    """

    def __init__(self, capacity: int, device: torch.device):
        self.capacity, self.device = capacity, device
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}

    def place(self, starts: Sequence[int], count: int) -> None:
        """Say where the next forward pass's tokens go: `count` of them in each row b, from position `starts[b]` on."""
        self.num_keys = max(starts) + count
        """Positions that some query may look at."""
        assert self.num_keys <= self.capacity, f"{self.num_keys} positions do not fit into {self.capacity}"
        self.start = starts[0] if min(starts) == max(starts) else None
        starts_B1 = torch.tensor(starts, device=self.device)[:, None]
        self.positions_BT = starts_B1 + torch.arange(count, device=self.device)

    @property
    def needs_mask(self) -> bool:
        """Whether causality must be spelled out: not for prompts from position 0 on, nor for one token that sees all."""
        return self.start is None or (self.start > 0 and self.positions_BT.shape[1] > 1)

    def extend(self, layer: str, k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; returns all that queries may look at, [B, K, num_keys, H] each."""
        if layer not in self._buffers:
            rows, _, heads, head_dim = k_BTKH.shape
            shape = (rows, heads, self.capacity, head_dim)
            self._buffers[layer] = (k_BTKH.new_zeros(shape), v_BTKH.new_zeros(shape))
        keys_BKSH, values_BKSH = self._buffers[layer]
        if self.start is not None:
            keys_BKSH[:, :, self.start : self.num_keys] = k_BTKH.transpose(1, 2)
            values_BKSH[:, :, self.start : self.num_keys] = v_BTKH.transpose(1, 2)
        else:
            rows_B1 = torch.arange(len(self.positions_BT), device=self.device)[:, None]
            keys_BKSH[rows_B1, :, self.positions_BT] = k_BTKH
            values_BKSH[rows_B1, :, self.positions_BT] = v_BTKH
        return keys_BKSH[:, :, : self.num_keys], values_BKSH[:, :, : self.num_keys]
