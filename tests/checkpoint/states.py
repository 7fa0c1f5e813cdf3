"""States for the tests: DTensors on any (pp, dp, tp) mesh whose numbers depend on their names alone."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from neox_native.config.schema import Parallel
from neox_native.mesh import build_mesh

NAMES = {
    "model.layers.0.query_key_value.weight": ((24, 8), Shard(0)),
    "model.layers.1.dense.weight": ((8, 24), Shard(1)),
    "model.layers.1.dense.bias": ((8,), Replicate()),
    "model.layers.2.tiny": ((3,), Replicate()),
    "model.layers.3.odd": ((10, 6), Shard(0)),
    "optimizer.exp_avg.layers.3.odd": ((10, 6), Shard(0)),
}


def full(name: str) -> torch.Tensor:
    """The whole tensor of a name, float32."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(NAMES[name][0], generator=generator)


def _chunk(tensor: torch.Tensor, dim: int, count: int, number: int) -> torch.Tensor:
    chunks = list(tensor.chunk(count, dim))
    return chunks[number] if number < len(chunks) else tensor.narrow(dim, 0, 0)


def state(pp: int = 1, dp: int = 1, tp: int = 1, filled: bool = True) -> dict[str, torch.Tensor]:
    """This rank's state, with the names' numbers or with NaN."""
    assert dist.get_world_size() == pp * dp * tp
    mesh = build_mesh(Parallel(pp=pp, dp=dp, tp=tp), torch.device("cpu"))
    tp_dp, coordinates = mesh.state_mesh(), mesh.place
    found: dict[str, torch.Tensor] = {}
    for name, (shape, placement) in NAMES.items():
        if int(name.split("layers.")[1].split(".")[0]) * pp // 4 != coordinates["pp"]:
            continue
        local = full(name)
        if isinstance(placement, Shard):
            local = _chunk(local, placement.dim, tp, coordinates["tp"])
        local = _chunk(local, 0, dp, coordinates["dp"]).clone().contiguous()
        if not filled:
            local.fill_(float("nan"))
        stride = torch.empty(shape, device="meta").stride()
        found[name] = DTensor.from_local(
            local, tp_dp, [placement, Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
        )
    found["optimizer.step"] = torch.tensor(7.0 if filled else 0.0)
    key = "rng." + "_".join(f"{axis}{number}" for axis, number in coordinates.items())
    found[key] = torch.full((4,), dist.get_rank() if filled else 99, dtype=torch.uint8)
    return found


def wrong(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names whose local numbers differ."""
    def local(value: torch.Tensor) -> torch.Tensor:
        return value.to_local() if isinstance(value, DTensor) else value

    return [name for name in expected if not torch.equal(local(loaded[name]), local(expected[name]))]
