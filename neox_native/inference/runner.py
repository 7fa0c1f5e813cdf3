"""Forward passes through a model that lies on a mesh.

Shapes: B rows, T tokens, D hidden, V vocabulary (this rank's share where it is cut), W whole padded vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from neox_native.inference.load import Loaded
from neox_native.model.cache import Cache


class Runner:
    """Every rank calls it with the same tokens; hidden states walk through the stages; the last stage has logits."""

    def __init__(self, loaded: Loaded):
        self.model, self.part, self.device = loaded.model, loaded.part, loaded.device
        self.stage, self.num_stages = loaded.mesh.pipeline.rank, loaded.mesh.pipeline.size
        self.is_last = self.stage == self.num_stages - 1
        self.pp_group = loaded.mesh.pipeline.group
        self.tp_group = loaded.mesh.tensor.peers
        self.speaker = loaded.mesh.first_of_last_stage
        """Global rank that tells the others what the last stage found."""
        self.dtype = next(self.part.parameters()).dtype

    @torch.inference_mode()
    def __call__(self, tokens_BT: Tensor, cache: Cache | None = None, readout_B: Tensor | None = None) -> Tensor | None:
        """Logits [B, T, V] on the last stage, this tensor-parallel rank's columns; None elsewhere.

        Args:
            cache: which was told where to `place` these tokens.
            readout_B: index in T of the one token of each row whose logits are wanted; they come as [B, 1, V].
        """
        # Without a cache, positions tell parts that see no tokens how long the rows are.
        positions_BT = None
        if cache is None and self.num_stages > 1:
            positions_BT = torch.arange(tokens_BT.shape[1], device=self.device).expand(tokens_BT.shape)
        x = tokens_BT if self.stage == 0 else self._receive(tokens_BT.shape)
        x = self.part(x, positions_BT=positions_BT, cache=cache, readout_B=readout_B)
        if self.is_last:
            return x
        dist.send(x.contiguous(), group=self.pp_group, group_dst=self.stage + 1)
        return None

    def _receive(self, shape: torch.Size) -> Tensor:
        hidden_BTD = torch.empty(*shape, self.model.hidden_size, dtype=self.dtype, device=self.device)
        dist.recv(hidden_BTD, group=self.pp_group, group_src=self.stage - 1)
        return hidden_BTD

    def whole_vocabulary(self, logits: Tensor) -> Tensor:
        """All columns [..., W] of logits [..., V], in fp32, on every tensor-parallel rank of the last stage."""
        if self.tp_group is not None:
            shares = [torch.empty_like(logits) for _ in range(dist.get_world_size(self.tp_group))]
            dist.all_gather(shares, logits.contiguous(), group=self.tp_group)
            logits = torch.cat(shares, dim=-1)
        return logits.float()

    def tell_everyone(self, found: Tensor | None, like: Tensor) -> Tensor:
        """What the last stage found, on every rank; `like` has its shape and type."""
        if dist.get_world_size() == 1:
            return found
        told = found.contiguous() if found is not None else torch.empty_like(like, device=self.device)
        dist.broadcast(told, src=self.speaker)
        return told
