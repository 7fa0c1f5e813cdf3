"""The groups of a mesh by purpose."""

from __future__ import annotations

import torch
import torch.distributed as dist

from neox_native.config.schema import Parallel
from neox_native.mesh import build_mesh
from tests.ranks import run_ranks


def test_every_purpose_has_its_ranks() -> None:
    def ranks_of() -> dict[str, list[int] | None]:
        mesh = build_mesh(Parallel(pp=2, dp=2, tp=2), torch.device("cpu"))
        groups = {
            "rows": mesh.rows.group,
            "dense": mesh.shards("dense").group,
            "expert": mesh.shards("expert").group,
            "pipeline": mesh.pipeline.group,
            "tensor": mesh.tensor.peers,
            "first": mesh.across_stages([0]),
        }
        state = mesh.state_mesh("dense")
        found = {name: group and dist.get_process_group_ranks(group) for name, group in groups.items()}
        return found | {"state": state.mesh.tolist(), "axes": state.mesh_dim_names, "place": list(mesh.place.values())}

    outcomes = run_ranks(8, ranks_of)
    assert outcomes[5] == {
        "rows": [5, 7], "dense": [5, 7], "expert": [5, 7], "pipeline": [1, 5], "tensor": [4, 5], "first": None,
        "state": [[4, 6], [5, 7]], "axes": ("tp", "dp"), "place": [1, 0, 1],
    }  # fmt: skip
    assert outcomes[1]["first"] == [1] and outcomes[0]["state"] == [[0, 2], [1, 3]]


def test_shards_are_neighbours_on_dp_and_replicas_are_as_far_apart_as_a_group_is_wide() -> None:
    def groups_of() -> dict[str, object]:
        mesh = build_mesh(Parallel(dp=4, tp=2, zero_stage=3, zero_shard_size=2), torch.device("cpu"))
        axes = {"rows": mesh.rows, "shards": mesh.shards(), "replicas": mesh.replicas()}
        state = mesh.state_mesh()
        found: dict[str, object] = {name: (dist.get_process_group_ranks(axis.group), axis.rank) for name, axis in axes.items()}
        return found | {"state": state.mesh.tolist(), "axes": state.mesh_dim_names, "place": mesh.place, "layout": mesh.layout}

    assert run_ranks(8, groups_of)[5] == {
        "rows": ([1, 3, 5, 7], 2), "shards": ([5, 7], 0), "replicas": ([1, 5], 1),
        "state": [[[0, 2], [4, 6]], [[1, 3], [5, 7]]], "axes": ("tp", "dp_replicate", "dp_shard"),
        "place": {"pp": 0, "dp": 2, "tp": 1}, "layout": "pp 1 x dp 4 in groups of 2 x tp 2",
    }  # fmt: skip


def test_an_axis_of_one_rank_has_no_peers() -> None:
    (peers,) = run_ranks(1, lambda: build_mesh(Parallel(dp=1), torch.device("cpu")).tensor.peers)
    assert peers is None
