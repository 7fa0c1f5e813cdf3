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


def test_an_axis_of_one_rank_has_no_peers() -> None:
    (peers,) = run_ranks(1, lambda: build_mesh(Parallel(dp=1), torch.device("cpu")).tensor.peers)
    assert peers is None
