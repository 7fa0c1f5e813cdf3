"""The one order in which a model is taken apart: split, shard, compile, recompute. Materialising comes last and is
the optimizer's, which knows what this rank keeps.

[Note: variants] torch keeps what it compiles with the code object, tries one variant after the other in each call, and refuses the
ninth. So each sort of block, by its kinds and its backend, has a code object of its own: its layers share its variants, which
are two, for training and for evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from neox_native.config.layout_rules import ZERO_BUBBLE, head_gradients_in_forward
from neox_native.config.schema import Compile, Model, Parallel, Training
from neox_native.dtypes import DTYPES
from neox_native.mesh import Mesh
from neox_native.model.block import Block
from neox_native.model.kinds import Kind, dealt, kinds_of_layers
from neox_native.model.transformer import Transformer
from neox_native.parallel import async_tp, tensor
from neox_native.parallel.recompute import recompute, within_budget
from neox_native.parallel.stages import stage_layers, stages_of_rank


def assemble(
    model: Model, parallel: Parallel, training: Training, compilation: Compile, mesh: Mesh
) -> dict[int, Transformer]:
    """This rank's parts of the model, on the meta device: global stage number -> part.

    Parameters have the training dtype and, where tp > 1, are DTensors over the tp axis. A tied head has a parameter of its own,
    so that its gradient is told from the embedding's on one rank as it is on two.
    """
    num_stages = parallel.pp * parallel.virtual_stages
    overlaps = parallel.async_tp and compilation.on
    compiler = async_tp.overlapping if overlaps else None
    kinds = kinds_of_layers(model)
    layers = stage_layers(model, num_stages, parallel.stage_layers)
    parts = {}
    for number in stages_of_rank(mesh.pipeline.rank, parallel.pp, parallel.virtual_stages, parallel.pipeline_schedule):
        with torch.device("meta"):
            part = Transformer(dealt(model, parallel.tp), layers[number], first=number == 0, last=number == num_stages - 1)
        part.to(DTYPES[training.precision])
        if parallel.tp > 1:
            tensor.apply(part, mesh.tensor.mesh, parallel.sequence_parallel, overlaps)
        if model.tie_embeddings and part.embed_in is not None and part.readout is not None:
            part.readout.embed_out.weight = nn.Parameter(torch.empty_like(part.embed_in.weight))
        if part.readout is not None:
            loss = part.readout.cross_entropy
            loss.slice_tokens, loss.split = training.loss_slice_tokens, parallel.pipeline_schedule in ZERO_BUBBLE
            loss.compiled = compilation.on
            loss.early = head_gradients_in_forward(parallel)
        for number_of_layer, block in part.layers.items():
            forgets = training.forgets(int(number_of_layer))
            inside = forgets != "none" and compilation.on and not model.drops  # see [Note: compiled recomputation]
            if forgets != "none" and not inside:
                recompute(block, selective=forgets == "selective")
            if compilation.on:
                budget = training.activation_memory_budget if forgets == "selective" else 0.0
                backend = within_budget(budget, compiler) if inside else compiler or "inductor"
                # The bound method, not the module: names stay, and hooks on the block run outside the graph.
                compute = _code_of_its_own(kinds[int(number_of_layer)], backend).__get__(block)
                block.compute = torch.compile(compute, fullgraph=True, dynamic=False, backend=backend)
        parts[number] = part
    return parts


@cache
def _code_of_its_own(kinds: tuple[Kind, ...], backend: str | Callable[..., Any]) -> Any:
    """`Block.compute` for one sort of blocks. See [Note: variants]."""
    compute = Block.compute
    name = "_".join(["compute", *(kind.name for kind in kinds)])
    return FunctionType(compute.__code__.replace(co_name=name), compute.__globals__, name)


def local_slice(full: Tensor, parameter: Tensor, rows: tuple[range, range] | None = None) -> Tensor:
    """What this rank holds of a full tensor that is laid out like `parameter`, or consists of `rows` of it (see
    `cuts.rows_of_rank`)."""
    if rows is not None:
        return torch.cat([full[each.start : each.stop] for each in rows])
    if isinstance(parameter, DTensor):
        for placement, size, rank in zip(parameter.placements, parameter.device_mesh.shape, parameter.device_mesh.get_coordinate()):
            if isinstance(placement, Shard):
                full = full.chunk(size, dim=placement.dim)[rank]
    return full
