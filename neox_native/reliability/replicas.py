"""Are replicas still equal? Ranks that hold copies of a tensor compare hashes and name the first tensor that differs.

Copies drift apart through a bug, a broken GPU or a flipped bit; training goes on and the loss looks fine for a while.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from neox_native.hashes import tensor_hash
from neox_native.launch import Ranks

Copies = Iterable[tuple[str, torch.Tensor]]
"""Names and tensors that the ranks of a group should hold alike."""


def replica_hashes(tensors: Copies, group: dist.ProcessGroup) -> list[tuple[str, list[int]]]:
    """(name, hash on each rank of `group`) for tensors that these ranks should hold alike; one all-gather."""
    named = list(tensors)
    if not named:
        return []
    own = torch.stack([tensor_hash(tensor).cpu() for _, tensor in named])
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, own.tolist(), group=group)
    return [(name, [hashes[number] for hashes in every]) for number, (name, _) in enumerate(named)]


def check_replicas(copies: Iterable[tuple[str, dist.ProcessGroup, Copies]], ranks: Ranks) -> str | None:
    """What differs first, as a sentence that is the same on all ranks, or None.

    Args:
        copies: (mesh axis, its process group, (name, tensor) of what the ranks of that group should hold alike).
    """
    complaint = None
    for axis, group, tensors in copies:
        for name, hashes in replica_hashes(tensors, group):
            common = max(hashes, key=hashes.count)
            if complaint is None and hashes.count(common) < len(hashes):
                members = dist.get_process_group_ranks(group)
                odd = [rank for rank, value in zip(members, hashes, strict=True) if value != common]
                complaint = f"{name} differs between the {axis} replicas {members}: rank {odd[0]} is not like the others"
    return next((found for found in ranks.gather(complaint) if found is not None), None)
