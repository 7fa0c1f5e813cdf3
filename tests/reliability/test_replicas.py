"""A replica that drifted is found and named."""

from __future__ import annotations

import torch
import torch.distributed as dist

from neox_native.launch import Ranks
from neox_native.reliability.replicas import check_replicas
from tests.ranks import run_ranks


def test_changed_weight_of_one_replica_is_named_on_all_ranks() -> None:
    def rank() -> tuple[str | None, str | None]:
        weights = {"layers.0.weight": torch.ones(5), "layers.1.weight": torch.ones(5), "rng": torch.arange(9).byte()}
        group = dist.group.WORLD
        assert group is not None
        before = check_replicas([("dp", group, weights.items())], Ranks())
        if dist.get_rank() == 1:
            weights["layers.1.weight"][3] += 1e-7
            weights["rng"][0] = 7
        return before, check_replicas([("dp", group, weights.items())], Ranks())

    expected = "layers.1.weight differs between the dp replicas [0, 1, 2]: rank 1 is not like the others"
    assert run_ranks(3, rank) == [(None, expected)] * 3
