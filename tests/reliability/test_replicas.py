"""A replica that drifted is found and named."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from neox_native.launch import Ranks
from neox_native.reliability.replicas import check_replicas, tensor_hash
from tests.ranks import run_ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_hash_sees_every_element_and_its_place(dtype: torch.dtype) -> None:
    base = torch.arange(1, 8).to(dtype)
    hashes = {int(tensor_hash(base)), int(tensor_hash(base.flip(0)))}
    for place in range(7):
        changed = base.clone()
        changed[place] += 1
        hashes.add(int(tensor_hash(changed)))
    assert len(hashes) == 9


def test_hash_of_a_long_tensor_is_that_of_its_chunks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    import neox_native.reliability.replicas as replicas

    tensor = torch.randn(1000)
    whole = int(tensor_hash(tensor))
    monkeypatch.setattr(replicas, "_CHUNK", 64)
    assert int(tensor_hash(tensor)) == whole
    assert int(tensor_hash(torch.empty(0))) == 0


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
