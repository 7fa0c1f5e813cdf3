"""What a rank has of a model in a layout: stages, layers, parameters, units. Pure arithmetic.

[Note: letters] b sequences of a microbatch, T sequence length, h hidden size, V padded vocabulary, L layers of a rank,
m microbatches per step; p, d, t the degrees of pipeline, data and tensor parallelism, v virtual stages; e bytes of an
element of the training precision. A config must be resolved: `parallel.dp` is a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from neox_native.config.schema import Config, Model, Parallel
from neox_native.dtypes import ELEMENT_BYTES
from neox_native.errors import UserError
from neox_native.model.block import block_cards
from neox_native.model.costs import Costs
from neox_native.model.kinds import dealt, kinds_of_layers
from neox_native.model.kinds.kind import Kind
from neox_native.model.parameters import Card
from neox_native.model.readout import readout_cards
from neox_native.model.transformer import embedding_cards
from neox_native.parallel.cuts import local_shape
from neox_native.parallel.stages import stage_layers, stages_of_rank
from neox_native.zero.layout import Layout, lay_out

Kinds = tuple[Kind, ...]
"""Those of one layer."""


@dataclass(frozen=True)
class Share:
    """What one pipeline rank has of the model."""

    stages: tuple[int, ...]
    layers: tuple[range, ...]
    """Global numbers of the layers of each of its stages."""
    first: bool
    """Whether it has the embedding."""
    last: bool
    """Whether it has the head and the loss."""


def share_of(config: Config, pp_rank: int) -> Share:
    """The share of pipeline rank `pp_rank`. See [Note: stages]."""
    parallel = config.parallel
    cut = parallel.pp, parallel.virtual_stages, parallel.pipeline_schedule
    return _share(config.model, *cut, tuple(parallel.stage_layers), pp_rank)


@cache  # a search asks for few shares very often
def _share(model: Model, pp: int, virtual_stages: int, schedule: str, explicit: tuple[int, ...], pp_rank: int) -> Share:
    num_stages = pp * virtual_stages
    stages = tuple(stages_of_rank(pp_rank, pp, virtual_stages, schedule))
    layers = stage_layers(model, num_stages, explicit)
    return Share(stages, tuple(layers[stage] for stage in stages), 0 in stages, num_stages - 1 in stages)


@cache
def layer_kinds(model: Model, share: Share) -> list[list[Kinds]]:
    """The kinds of each layer of each of a rank's stages."""
    kinds = kinds_of_layers(model)
    return [[kinds[number] for number in layers] for layers in share.layers]


def states_costs(model: Model) -> bool:
    """Whether every layer kind does, so that memory and speed can be predicted."""
    return all(kind.costs for layer in kinds_of_layers(model) for kind in layer)


@cache
def layer_costs(model: Model, kinds: Kinds, tp: int) -> list[Costs]:
    """What the kinds of a layer cost, in the model whose even parts tp ranks hold.

    Raises:
        UserError: one of them does not say.
    """
    for kind in kinds:
        if not kind.costs:
            raise UserError(
                f"model.pattern has the layer kind {kind.name!r}, which does not state its costs, so that memory and speed cannot "
                "be predicted; `tools/plan.py dry-run` counts what a layout needs."
            )
    return [kind.costs(dealt(model, tp)) for kind in kinds]


def num_microbatches(config: Config) -> int:
    """m."""
    return config.training.num_microbatches(config.parallel.dp)


def shard_of_sequence(parallel: Parallel) -> int:
    """Parts into which the residual stream is cut: t with sequence parallelism, else 1."""
    return parallel.tp if parallel.sequence_parallel else 1


def activation_bytes(config: Config) -> int:
    """One activation [b, T, h]: the unit of tensor-parallel traffic and of the memory of activations."""
    training, model = config.training, config.model
    return training.micro_batch_size * model.seq_length * model.hidden_size * ELEMENT_BYTES[training.precision]


def stream_bytes(config: Config) -> int:
    """The residual stream of one microbatch, as it lies on a rank and travels between stages."""
    return activation_bytes(config) // shard_of_sequence(config.parallel)


def unit_cards(config: Config, pp_rank: int) -> list[list[Card]]:
    """The cards of each of a rank's units: embedding, layers, head with its norm."""
    return _unit_cards(config.model, share_of(config, pp_rank))


@cache
def _unit_cards(model: Model, share: Share) -> list[list[Card]]:
    layers = [kinds for stage in layer_kinds(model, share) for kinds in stage]
    cards = {kinds: list(block_cards(model, kinds).values()) for kinds in set(layers)}
    units = [cards[kinds] for kinds in layers]
    if share.first:
        units.insert(0, list(embedding_cards(model).values()))
    if share.last:
        tied_here = model.tie_embeddings and share.first
        units.append(list(readout_cards(replace(model, tie_embeddings=tied_here)).values()))
    return units


def zero_stage_of(parallel: Parallel) -> int:
    """The ZeRO stage, 0 where there is one data-parallel rank."""
    return parallel.zero_stage if parallel.dp > 1 else 0


def rows_of(config: Config, pp_rank: int) -> list[Layout]:
    """The matrix of each of a rank's units. See [Note: rows and units]."""
    world = config.parallel.dp if zero_stage_of(config.parallel) else 1
    return _rows(config.model, config.parallel.tp, share_of(config, pp_rank), world)


@cache
def _rows(model: Model, tp: int, share: Share, world: int) -> list[Layout]:
    units = _unit_cards(dealt(model, tp), share)
    return [_laid_out(tuple(local_shape(card, tp) for card in unit), world) for unit in units]


_laid_out = cache(lay_out)  # layers of the same kinds have one layout


@dataclass(frozen=True)
class Elements:
    """Sums over a rank's units, in elements."""

    parameters: int
    """As the code reads them, ZeRO left out of account."""
    padded: int
    """Whole parameters with chunks filled up."""
    rows: int
    """This rank's rows, padding between slots included."""
    matrices: int
    """All rows."""
    owned: int
    """Of the first data-parallel rank, without padding."""


def elements_of(config: Config, pp_rank: int) -> Elements:
    """The sums of a rank."""
    world = config.parallel.dp if zero_stage_of(config.parallel) else 1
    return _elements(config.model, config.parallel.tp, share_of(config, pp_rank), world)


@cache
def _elements(model: Model, tp: int, share: Share, world: int) -> Elements:
    layouts = _rows(model, tp, share, world)
    slots = [slot for layout in layouts for slot in layout.slots]
    return Elements(
        parameters=sum(slot.num_elements for slot in slots),
        padded=sum(world * slot.width for slot in slots),
        rows=sum(layout.size for layout in layouts),
        matrices=sum(world * layout.size for layout in layouts),
        owned=sum(math.prod(slot.local_shape(0)) for slot in slots),
    )
