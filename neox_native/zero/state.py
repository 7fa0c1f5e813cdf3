"""Shards as DTensors: the form in which master weights and optimizer state meet checkpoints and tests.

[Note: global state] A rank's shard is dim-0 chunk r of its tp-local shard. On a mesh ordered (tp, ranks of the unit's
group) that is an ordinary DTensor with placements [placement over tp, Shard(0)]: first cut by tp, then by the group. Its
name and its shape are those of the whole model, so a checkpoint made of such tensors loads into any degrees and any ZeRO
stage. Where tp ranks hold copies of some rows (`SharedRows`), no placement says so, and the shard's `Boxes` are told one
by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Replicate, Shard

from neox_native.zero.spec import ParameterSpec
from neox_native.zero.unit import ShardedUnit


class Boxes(torch.Tensor):
    """A global tensor of which this rank holds some ranges of dim-0 rows, in one local tensor. It speaks DCP's protocol for
    such tensors (`torch.distributed._checkpointable`), which writes a box that several ranks hold once.

    Args:
        local: shape [sum of the ranges, ...].
        ranges: rows of the global tensor, in local order; empty ones hold nothing.
        num_rows: of the global tensor.
    """

    @staticmethod
    def __new__(cls, local: Tensor, ranges: Sequence[range], num_rows: int) -> Boxes:
        boxes = torch.Tensor._make_wrapper_subclass(
            cls, (num_rows, *local.shape[1:]), dtype=local.dtype, device=local.device
        )
        pieces = local.split([len(rows) for rows in ranges])
        boxes.local, boxes.ranges = local, tuple(ranges)
        boxes.pieces = {rows.start: piece for rows, piece in zip(ranges, pieces) if len(rows)}
        return boxes

    def to_local(self) -> Tensor:
        """All boxes, one after the other."""
        return self.local

    def like(self, local: Tensor) -> Boxes:
        """The same boxes of another local tensor, such as a copy in host memory."""
        return Boxes(local, self.ranges, self.shape[0])

    @classmethod
    def __torch_dispatch__(cls, function: Callable[..., Any], _types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        """Copies in another type or of another kind; there is nothing else to do with boxes."""
        aten = torch.ops.aten
        assert function in (aten.detach.default, aten._to_copy.default), f"{function} of boxes"
        boxes, *rest = arguments
        return boxes.like(function(boxes.local, *rest, **(keywords or {})))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk(start, piece) for start, piece in self.pieces.items()]

    def __create_write_items__(self, name: str, _object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, self.shape)
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.offset[0]]

    def _chunk(self, start: int, piece: Tensor) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size((start, *[0] * (piece.dim() - 1))), piece.shape)


def as_global(spec: ParameterSpec, shard: Tensor, unit: ShardedUnit, first_row: int) -> DTensor | Boxes:
    """The global tensor of which this rank holds `shard`; it shares memory with `shard`.

    Args:
        unit: the one that the parameter belongs to.
        first_row: of the tp-local parameter in `shard`.
    """
    if spec.shared is not None:
        shared, end = spec.shared, first_row + len(shard)
        before = len(shared.own)
        own, copied = shared.own[first_row:end], shared.copied[max(0, first_row - before) : max(0, end - before)]
        return Boxes(shard, (own, copied), shared.num_rows)
    shape = spec.parameter.shape
    return DTensor.from_local(
        shard,
        unit.state_mesh,
        [spec.placement, *[Replicate()] * (unit.state_mesh.ndim - 2), Shard(0) if unit.zero_stage else Replicate()],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def first_rows(value: Tensor, count: int, num_rows: int) -> Boxes:
    """This rank's part of the first `count` rows of a global tensor from `as_global`, as boxes of another one that has
    `num_rows` rows."""
    (chunk,) = value.__create_chunk_list__()
    start, local = chunk.offsets[0], value.to_local()
    held = range(start, start + len(local))[: max(0, count - start)]
    return Boxes(local[: len(held)], [held], num_rows)


def optimizer_state(optimizer: torch.optim.Optimizer, shard: Tensor) -> dict[str, Tensor]:
    """State of one shard by name: tensors of its shape, and scalars, which are the same for all shards."""
    state = optimizer.state[shard]
    for name, value in state.items():
        assert isinstance(value, Tensor) and value.shape in (shard.shape, ()), f"{name} is not elementwise: {value}"
    return dict(state)
