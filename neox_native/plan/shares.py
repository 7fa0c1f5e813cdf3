"""What a rank has of a model in a layout: stages, layers, units, parameters. Pure arithmetic.

[Note: letters] b sequences of a microbatch, T sequence length, h hidden size, V padded vocabulary, L layers of a rank,
m microbatches per step; p, d, t the degrees of pipeline, data and tensor parallelism, v virtual stages; e bytes of an
element of the training precision, g of one of a gradient's sum. A config must be resolved: `parallel.dp` is a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, cached_property

from neox_native.config.schema import Config, Model, Parallel, Training
from neox_native.dtypes import ELEMENT_BYTES, FP32_BYTES, INT64_BYTES
from neox_native.errors import UserError
from neox_native.fixed_point import LIMBS
from neox_native.model.block import block_cards
from neox_native.model.costs import Costs
from neox_native.model.kinds import dealt, kinds_of_layers
from neox_native.model.kinds.kind import Kind
from neox_native.model.parameters import Card
from neox_native.model.readout import readout_cards
from neox_native.model.transformer import embedding_cards
from neox_native.parallel.cuts import local_shape
from neox_native.parallel.stages import stage_layers, stages_of_rank
from neox_native.zero.layout import Layout, Slot, lay_out

Kinds = tuple[Kind, ...]
"""The kinds of one layer."""
Sort = tuple[Kinds, str]
"""The kinds of one layer, and what it forgets: see `Training.forgets`."""


@dataclass(frozen=True)
class Share:
    """What one pipeline rank has of the model, with the first tensor- and data-parallel ranks' part of it."""

    model: Model
    tp: int
    world: int
    """Ranks among which ZeRO shards a unit."""
    stages: tuple[int, ...]
    layers: tuple[range, ...]
    """Global numbers of the layers of each of its stages."""
    first: bool
    """Whether it has the embedding."""
    last: bool
    """Whether it has the head and the loss."""

    @cached_property
    def kinds(self) -> list[list[Kinds]]:
        """The kinds of each layer of each of its stages."""
        kinds = kinds_of_layers(self.model)
        return [[kinds[number] for number in layers] for layers in self.layers]

    def sorts(self, training: Training) -> list[list[Sort]]:
        """The sort of each layer of each of its stages."""
        stages = zip(self.kinds, self.layers)
        return [[(each, training.forgets(number)) for each, number in zip(kinds, layers)] for kinds, layers in stages]

    def cards(self, model: Model) -> list[list[Card]]:
        """The cards of its units in a model of as many layers: embedding, layers, readout."""
        layers = [kinds for stage in self.kinds for kinds in stage]
        blocks = {kinds: list(block_cards(model, kinds).values()) for kinds in set(layers)}
        untied = replace(model, tie_embeddings=model.tie_embeddings and self.first)  # a tied matrix lies at both ends
        embedding, readout = embedding_cards(model).values(), readout_cards(untied).values()
        return [list(embedding)] * self.first + [blocks[kinds] for kinds in layers] + [list(readout)] * self.last

    @cached_property
    def units(self) -> list[Layout]:
        """The matrix of each of its units. See [Note: rows and units]."""
        cards = self.cards(dealt(self.model, self.tp))
        return [_laid_out(tuple(local_shape(card, self.tp) for card in unit), self.world) for unit in cards]

    @cached_property
    def slots(self) -> list[Slot]:
        """The slots of all units."""
        return [slot for unit in self.units for slot in unit.slots]

    @cached_property
    def parameters(self) -> int:
        """Elements as the code reads them, ZeRO left out of account."""
        return sum(slot.num_elements for slot in self.slots)

    @cached_property
    def padded(self) -> int:
        """Elements of whole parameters with chunks filled up."""
        return sum(self.world * slot.width for slot in self.slots)

    @cached_property
    def owned(self) -> int:
        """Elements of the first data-parallel rank, without padding."""
        return sum(math.prod(slot.local_shape(0)) for slot in self.slots)

    @cached_property
    def row(self) -> int:
        """Elements of one rank's rows, padding between slots included."""
        return sum(unit.size for unit in self.units)


_laid_out = cache(lay_out)  # layers of the same kinds have one layout


def share_of(config: Config, pp_rank: int) -> Share:
    """The share of pipeline rank `pp_rank`. See [Note: stages]."""
    parallel, world = config.parallel, config.parallel.shard_ranks
    cut = parallel.pp, parallel.virtual_stages, parallel.pipeline_schedule, tuple(parallel.stage_layers)
    return _share(config.model, parallel.tp, world, pp_rank, *cut)


@cache  # a search asks for few shares very often
def _share(
    model: Model, tp: int, world: int, pp_rank: int, pp: int, virtual_stages: int, schedule: str, explicit: tuple[int, ...]
) -> Share:
    num_stages = pp * virtual_stages
    stages = tuple(stages_of_rank(pp_rank, pp, virtual_stages, schedule))
    layers = stage_layers(model, num_stages, explicit)
    return Share(model, tp, world, stages, tuple(layers[stage] for stage in stages), 0 in stages, num_stages - 1 in stages)


def states_costs(model: Model) -> bool:
    """Whether every layer kind states its costs, so that memory and speed can be predicted."""
    return all(kind.costs for layer in kinds_of_layers(model) for kind in layer)


@cache
def layer_costs(model: Model, kinds: Kinds, tp: int) -> list[Costs]:
    """What the kinds of a layer cost, in the model whose even parts tp ranks hold.

    Raises:
        UserError: one of them does not state its costs.
    """
    for kind in kinds:
        if not kind.costs:
            raise UserError(
                f"model.pattern has the layer kind {kind.name!r}, which does not state its costs, so that memory and speed "
                "cannot be predicted; `tools/plan.py dry-run` counts what a layout needs."
            )
    return [kind.costs(dealt(model, tp)) for kind in kinds]


def num_microbatches(config: Config) -> int:
    """m."""
    return config.training.num_microbatches(config.parallel.dp)


def activation_bytes(config: Config) -> int:
    """One activation [b, T, h]: the unit of tensor-parallel traffic and of the memory of activations."""
    training, model = config.training, config.model
    return training.micro_batch_size * model.seq_length * model.hidden_size * ELEMENT_BYTES[training.precision]


def stream_bytes(config: Config) -> int:
    """The residual stream of one microbatch, as it lies on a rank and travels between stages: cut with sequence
    parallelism."""
    return activation_bytes(config) // (config.parallel.tp if config.parallel.sequence_parallel else 1)


def gradient_bytes(config: Config) -> int:
    """g: one element of a gradient while it is summed over microbatches and ranks, where it lies and on its way."""
    return INT64_BYTES if config.run.determinism == "elastic" else FP32_BYTES


def norm_bytes(config: Config) -> int:
    """The gradient's squared norm while it is summed over ranks: one fp64 number, or integers, see [Note: range and grain]."""
    return INT64_BYTES * (LIMBS if config.run.determinism == "elastic" else 1)


def zero_stage_of(parallel: Parallel) -> int:
    """The ZeRO stage, 0 where there is one data-parallel rank."""
    return parallel.zero_stage if parallel.dp > 1 else 0
