"""From this rank's parts of the model to an optimizer that owns their parameters, and an engine that runs them."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from neox_native.config.schema import Config, Model, Parallel
from neox_native.dtypes import DTYPES
from neox_native.engine.single_stage import Engine, SingleStage
from neox_native.engine.spikes import SpikeGuard
from neox_native.engine.step import Losses, TrainStep
from neox_native.model import initialize
from neox_native.model.transformer import Transformer, cards
from neox_native.optim.groups import optimizer_factory
from neox_native.optim.loss_scale import LossScale
from neox_native.parallel import tensor
from neox_native.parallel.assemble import assemble, local_slice
from neox_native.parallel.cuts import rows_of_rank, sharers
from neox_native.parallel.pipeline import Pipeline
from neox_native.parallel.stages import rank_of_stage
from neox_native.zero.layout import ZeroStage
from neox_native.zero.optimizer import ShardedOptimizer
from neox_native.zero.unit import ParameterSpec, SharedRows, Unit


def build_model(
    config: Config, mesh: DeviceMesh, device: torch.device
) -> tuple[dict[int, Transformer], ShardedOptimizer]:
    """This rank's parts of the model, materialised, and the optimizer that owns their parameters."""
    parts = assemble(config.model, config.parallel, config.training, config.compile, mesh)
    units = units_of(parts, config.model, config.parallel, mesh)
    return parts, build_optimizer(config, mesh, device, parts, units)


def build_optimizer(
    config: Config,
    mesh: DeviceMesh,
    device: torch.device,
    parts: dict[int, Transformer],
    units: dict[int, list[Unit]],
) -> ShardedOptimizer:
    """The optimizer that owns the parameters of `parts`, grouped as `units_of` does; it takes them to `device`.

    The last step of `parallel/assemble.py`'s order: only the optimizer knows which rows of a parameter this rank
    keeps, so it materialises them, one full parameter in memory at a time.
    """
    optimizer = ShardedOptimizer(
        units,
        mesh,
        ZeroStage(config.parallel.zero_stage),
        optimizer_factory(config.optimizer),
        DTYPES[config.training.precision],
        device,
    )

    def draw(spec: ParameterSpec) -> Tensor:
        full = initialize.draw(spec.name, cards(config.model)[spec.name], config.run.seed)
        return local_slice(full, spec.parameter, spec.shared and (spec.shared.own, spec.shared.copied))

    optimizer.materialize(draw)
    for part in parts.values():
        part.build_tables(device)
        if config.parallel.tp > 1:
            tensor.shard_tables(part, mesh["tp"])
    return optimizer


def units_of(
    parts: dict[int, Transformer], model: Model, parallel: Parallel, mesh: DeviceMesh
) -> dict[int, list[Unit]]:
    """What ZeRO shards together, for each stage of this rank: the embedding, each block, and the head with its norm."""
    tied_group = _ends_of_the_pipeline(parallel, mesh)
    tp_group = mesh.get_group("tp") if parallel.tp > 1 else None
    tp_rank, described = mesh.get_local_rank("tp"), cards(model)
    ranks_per_group = max(sharers(card, parallel.tp) for card in described.values())
    neighbours = _neighbours(mesh, ranks_per_group) if ranks_per_group > 1 else None
    owned: set[int] = set()

    def spec(part: Transformer, local_name: str, parameter: nn.Parameter) -> ParameterSpec:
        name, sum_over = part.global_name(local_name), []
        card = described[name]
        partial = card.gradient == "partial" or card.gradient == "partial_in_sequence" and parallel.sequence_parallel
        if tp_group is not None and partial:
            sum_over.append(tp_group)
        copy_of_first = False
        if part.config.tie_embeddings and card.role == "embedding" and card.cut is not None and tied_group is not None:
            sum_over.append(tied_group)
            copy_of_first = part.embed_in is None
        sharded = isinstance(parameter, DTensor) and isinstance(parameter.placements[0], Shard)
        counted = (sharded or tp_rank == 0) and not copy_of_first
        shared, rows = None, rows_of_rank(card, parallel.tp, tp_rank)
        if rows is not None:
            shared = SharedRows(*rows, card.shape[0], neighbours, counted=tp_rank % ranks_per_group == 0)
        return ParameterSpec(name, parameter, card.decay, tuple(sum_over), counted, shared)

    def unit(part: Transformer, name: str, modules: list[nn.Module | None], prefixes: tuple[str, ...]) -> Unit | None:
        found = [(n, p) for n, p in part.named_parameters() if n.startswith(prefixes) and id(p) not in owned]
        owned.update(id(parameter) for _, parameter in found)
        specs = [spec(part, local_name, parameter) for local_name, parameter in found]
        present = tuple(module for module in modules if module is not None)
        return Unit(name, present, specs) if specs else None

    units: dict[int, list[Unit]] = {}
    for number, part in parts.items():
        tied_here = part.config.tie_embeddings and part.embed_in is not None and part.readout is not None
        embedding = [part] if tied_here else [part.embed_in, part.embed_pos]
        found = [unit(part, "embedding", embedding, ("embed_in.", "embed_pos."))]
        found += [unit(part, f"layers.{n}", [block], (f"layers.{n}.",)) for n, block in part.layers.items()]
        if part.readout is not None:
            found += [unit(part, "head", [part.readout.final_layer_norm, part.readout.embed_out], ("readout.",))]
        units[number] = [each for each in found if each is not None]
    return units


def _ends_of_the_pipeline(parallel: Parallel, mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The group of this column's first and last stage; None elsewhere, and where both are on one rank. Collective."""
    last_stage = parallel.pp * parallel.virtual_stages - 1
    last = rank_of_stage(last_stage, parallel.pp, parallel.pipeline_schedule)
    if last == 0:
        return None
    columns = mesh.mesh[[0, last]].flatten(1).T.tolist()
    mine, _ = dist.new_subgroups_by_enumeration(columns)
    return mine


def _neighbours(mesh: DeviceMesh, count: int) -> dist.ProcessGroup:
    """The group of this rank among each `count` neighbours on the tp axis, which is the innermost. Collective."""
    if count == mesh["tp"].size():
        return mesh.get_group("tp")
    mine, _ = dist.new_subgroups_by_enumeration(mesh.mesh.reshape(-1, count).tolist())
    return mine


def build_engine(
    config: Config, mesh: DeviceMesh, device: torch.device, parts: dict[int, Transformer], optimizer: ShardedOptimizer
) -> Engine:
    """What runs a step's microbatches: a loop, or the pipeline's schedule."""
    parallel, training, model = config.parallel, config.training, config.model
    if parallel.pp == 1:
        engine: Engine = SingleStage(parts[0], optimizer, device)
    else:
        engine = Pipeline(
            parts,
            num_stages=parallel.pp * parallel.virtual_stages,
            schedule=parallel.pipeline_schedule,
            num_microbatches=training.num_microbatches(parallel.dp),
            microbatch_shape=(training.micro_batch_size, model.seq_length),
            hidden_length=model.seq_length // (parallel.tp if parallel.sequence_parallel else 1),
            dtype=DTYPES[training.precision],
            device=device,
            pp_group=mesh.get_group("pp"),
            sink=optimizer,
        )
    optimizer.time_waits(engine.timing.compute.paused)
    return engine


def build_step(
    config: Config, mesh: DeviceMesh, device: torch.device, engine: Engine, optimizer: ShardedOptimizer
) -> TrainStep:
    """What one optimizer step is, with the loss scale of fp16 and the guard against spikes where they are asked for."""
    training = config.training
    return TrainStep(
        engine,
        optimizer,
        Losses(mesh, device),
        training.clip_grad_norm,
        LossScale(training, device) if training.precision == "fp16" else None,
        SpikeGuard(training, device) if training.spike_threshold > 0 else None,
    )
