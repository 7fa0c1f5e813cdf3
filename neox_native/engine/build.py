"""From this rank's parts of the model to an optimizer that owns their parameters, and an engine that runs them."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.torch_version import TorchVersion

from neox_native.config.layout_rules import ZERO_BUBBLE
from neox_native.config.schema import Config, Model, Parallel
from neox_native.dtypes import DTYPES
from neox_native.engine.dropout import DropoutSeeds
from neox_native.engine.objective import objective_of
from neox_native.engine.single_stage import Engine, SingleStage
from neox_native.engine.spikes import SpikeGuard
from neox_native.engine.step import Losses, TrainStep
from neox_native.errors import UserError
from neox_native.fixed_point import FixedGradients, FixedSums, RoundedSums
from neox_native.mesh import Mesh
from neox_native.model import initialize
from neox_native.model.kinds import kinds_of_layers
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
from neox_native.zero.spec import ParameterSpec, Rule, SharedRows, Unit


SUMS_PARTS_LATE = (2, 13)
"""torch from which on a split backward pass leaves the sum of partial gradients over tp to us."""


def require_possible(config: Config) -> None:
    """Refuse what the settings leave to the code and to torch to know, before anything is built.

    Raises:
        UserError: a layer kind or an objective that nobody has defined; an elastic run whose sums this torch rounds.
    """
    kinds_of_layers(config.model)
    objective_of(config.objective)
    parallel, schedule = config.parallel, config.parallel.pipeline_schedule
    rounds = TorchVersion(torch.__version__) < SUMS_PARTS_LATE
    if config.run.determinism == "elastic" and parallel.tp > 1 and schedule in ZERO_BUBBLE and rounds:
        raise UserError(
            f'run.determinism = "elastic" cannot hold with parallel.tp = {parallel.tp} and '
            f'parallel.pipeline_schedule = "{schedule}" in torch '
            f"{torch.__version__}, which adds parts of gradients over tp in floating point there; take torch 2.13 or another schedule."
        )


def build_model(
    config: Config, mesh: Mesh, device: torch.device
) -> tuple[dict[int, Transformer], ShardedOptimizer]:
    """This rank's parts of the model, materialised, and the optimizer that owns their parameters."""
    parts = assemble(config.model, config.parallel, config.training, config.compile, mesh)
    units = units_of(parts, config.model, config.parallel, mesh)
    return parts, build_optimizer(config, mesh, device, parts, units)


def build_optimizer(
    config: Config,
    mesh: Mesh,
    device: torch.device,
    parts: dict[int, Transformer],
    units: dict[int, list[Unit]],
) -> ShardedOptimizer:
    """The optimizer that owns the parameters of `parts`, grouped as `units_of` does; it takes them to `device`.

    The last step of `parallel/assemble.py`'s order: only the optimizer knows which rows of a parameter this rank
    keeps, so it materialises them, one full parameter in memory at a time.
    """
    # What is summed to one number: each microbatch's gradient, by either reader of a tied matrix, on each tp rank.
    num_addends = 2 * config.parallel.tp * config.training.num_microbatches(1)
    elastic = config.run.determinism == "elastic"
    optimizer = ShardedOptimizer(
        units,
        ZeroStage(config.parallel.zero_stage),
        optimizer_factory(config.optimizer, elementwise=elastic),
        DTYPES[config.training.precision],
        device,
        FixedGradients(num_addends, device) if elastic else None,
    )

    def draw(spec: ParameterSpec) -> Tensor:
        full = initialize.draw(spec.name, cards(config.model)[spec.name], config.run.seed)
        return local_slice(full, spec.parameter, spec.shared and (spec.shared.own, spec.shared.copied))

    optimizer.materialize(draw)
    for part in parts.values():
        part.build_tables(device)
        if config.parallel.tp > 1:
            tensor.shard_tables(part, mesh.tensor.mesh)
    return optimizer


def units_of(
    parts: dict[int, Transformer], model: Model, parallel: Parallel, mesh: Mesh
) -> dict[int, list[Unit]]:
    """What ZeRO shards together, for each stage of this rank: the embedding, each block, and the readout. What their cards
    say of the parameters becomes groups of ranks. A collective."""
    described, tp, state_mesh = cards(model), mesh.tensor, cache(mesh.state_mesh)
    last = rank_of_stage(parallel.pp * parallel.virtual_stages - 1, parallel.pp, parallel.pipeline_schedule)
    ends = mesh.across_stages([0, last]) if model.tie_embeddings and last > 0 else None
    numbers = {sharers(card, parallel.tp) for card in described.values()} - {1}
    neighbours = {number: mesh.tensor_neighbours(number) for number in sorted(numbers)}
    owned: set[int] = set()
    readouts = [part.readout for part in parts.values() if part.readout is not None]
    tied_heads = [readout.embed_out.weight for readout in readouts if model.tie_embeddings]

    def spec(part: Transformer, name: str, parameter: nn.Parameter) -> ParameterSpec:
        card, sum_over = described[name], []
        if tp.peers is not None and card.has_partial_gradient(parallel.sequence_parallel):
            sum_over.append(tp.peers)
        copy_of_first, aliases = False, ()
        if name == "embed_in.weight" and part.embed_in is not None:
            aliases = tuple(head for head in tied_heads if head is not parameter)
            owned.update(id(head) for head in aliases)
        if name == part.global_name("embed_out.weight") and ends is not None:
            sum_over.append(ends)  # both ends of the pipeline read the matrix
            copy_of_first = part.embed_in is None
        sharded = isinstance(parameter, DTensor) and isinstance(parameter.placements[0], Shard)
        counted = (sharded or tp.rank == 0) and not copy_of_first
        shared, rows, number = None, rows_of_rank(card, parallel.tp, tp.rank), sharers(card, parallel.tp)
        if rows is not None:
            shared = SharedRows(*rows, card.shape[0], neighbours[number], counted=tp.rank % number == 0)
        return ParameterSpec(name, parameter, Rule(card.decay, card.lr_multiplier), tuple(sum_over), counted, shared, aliases)

    def unit(name: str, family: str, readers: tuple[nn.Module, ...], found: list[ParameterSpec]) -> Unit:
        replicas, tables_alone = mesh.replicas(family), all(isinstance(reader, nn.Embedding) for reader in readers)
        return Unit(
            name, readers, found, mesh.shards(family).group, state_mesh(family), replicas and replicas.group, not tables_alone
        )

    def units(part: Transformer, name: str, readers: list[nn.Module], modules: dict[str, nn.Module]) -> list[Unit]:
        specs: dict[str, list[ParameterSpec]] = {}
        for prefix, module in modules.items():
            for local_name, parameter in module.named_parameters(prefix):
                if id(parameter) not in owned:
                    owned.add(id(parameter))
                    found = spec(part, part.global_name(local_name), parameter)
                    specs.setdefault(described[found.name].family, []).append(found)
        names = {"dense": name, "expert": f"{name}.experts"}
        return [unit(names[family], family, tuple(readers), found) for family, found in specs.items()]

    result: dict[int, list[Unit]] = {}
    for number, part in parts.items():
        ends_here = part.embed_in is not None and part.readout is not None
        tables = {name: module for name in ("embed_in", "embed_pos") if (module := getattr(part, name)) is not None}
        found = units(part, "embedding", [part] if model.tie_embeddings and ends_here else list(tables.values()), tables)
        for n, block in part.layers.items():
            found += units(part, f"layers.{n}", [block], {f"layers.{n}": block})
        if (readout := part.readout) is not None:
            found += units(part, "head", [readout], {"readout": readout})
        result[number] = found
    return result


def build_engine(
    config: Config, mesh: Mesh, device: torch.device, parts: dict[int, Transformer], optimizer: ShardedOptimizer
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
            pp_group=mesh.pipeline.group,
            sink=optimizer,
        )
    optimizer.time_waits(engine.timing.compute.paused)
    return engine


def build_step(
    config: Config, mesh: Mesh, device: torch.device, engine: Engine, optimizer: ShardedOptimizer
) -> TrainStep:
    """What one optimizer step is, with the loss scale of fp16 and the guard against spikes where the config asks for them."""
    training = config.training
    return TrainStep(
        engine,
        optimizer,
        Losses(mesh, device, objective_of(config.objective), FixedSums() if config.run.determinism == "elastic" else RoundedSums()),
        training.clip_grad_norm,
        LossScale(training, device) if training.precision == "fp16" else None,
        SpikeGuard(training, device) if training.spike_threshold > 0 else None,
        DropoutSeeds(mesh, config.run.seed, config.parallel.sequence_parallel),
    )
