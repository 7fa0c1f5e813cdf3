"""What a rank has of a model in a layout: stages, layers, parameters, units. Pure arithmetic.

[Note: letters] b sequences of a microbatch, T sequence length, h hidden size, V padded vocabulary, L layers of a rank,
m microbatches per step; p, d, t the degrees of pipeline, data and tensor parallelism, v virtual stages; e bytes of an
element of the training precision. A config must be resolved: `parallel.dp` is a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from neox_native.config.schema import Config, Model, Parallel
from neox_native.dtypes import ELEMENT_BYTES
from neox_native.model.kinds import dealt as held
from neox_native.parallel.cuts import share_of_vocabulary
from neox_native.parallel.stages import stage_layers, stages_of_rank
from neox_native.zero.layout import Layout, lay_out

Shapes = dict[str, tuple[int, ...]]


def rows_of_whole(model: Model) -> int:
    """Rows of the whole fused projection."""
    return (model.num_heads + 2 * model.kv_heads) * model.head_dim


@dataclass(frozen=True)
class Share:
    """What one pipeline rank has of the model."""

    stages: tuple[int, ...]
    layers: tuple[int, ...]
    """Number of layers of each of its stages."""
    first: bool
    """Whether it has the embedding."""
    last: bool
    """Whether it has the head and the loss."""

    @property
    def num_layers(self) -> int:
        """L."""
        return sum(self.layers)


def share_of(config: Config, pp_rank: int) -> Share:
    """The share of pipeline rank `pp_rank`. See [Note: stages]."""
    parallel = config.parallel
    cut = parallel.pp, parallel.virtual_stages, parallel.pipeline_schedule
    return _share(config.model, *cut, tuple(parallel.stage_layers), pp_rank)


@cache  # a search asks for few shares very often
def _share(model: Model, pp: int, virtual_stages: int, schedule: str, explicit: tuple[int, ...], pp_rank: int) -> Share:
    num_stages = pp * virtual_stages
    stages = tuple(stages_of_rank(pp_rank, pp, virtual_stages, schedule))
    counts = [len(layers) for layers in stage_layers(model, num_stages, explicit)]
    return Share(stages, tuple(counts[stage] for stage in stages), 0 in stages, num_stages - 1 in stages)


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


def key_share(config: Config) -> float:
    """Key-value heads over query heads, as a rank holds them."""
    return held(config.model, config.parallel.tp).kv_heads / config.model.num_heads


def block_shapes(model: Model, tp: int) -> Shapes:
    """Parameters of one block by name, as one tensor-parallel rank holds them. See [Note: tensor parallelism]."""
    h, ffn = model.hidden_size, model.ffn_size // tp
    rows = rows_of_whole(held(model, tp)) // tp
    norms = ("input_layernorm", "post_attention_layernorm")
    shapes: Shapes = {f"{norm}.weight": (h,) for norm in norms}
    if model.norm == "layernorm":
        shapes |= {f"{norm}.bias": (h,) for norm in norms}
    shapes |= {"query_key_value.weight": (rows, h), "dense.weight": (h, h // tp)}
    shapes |= {"dense_h_to_4h.weight": (ffn, h), "dense_4h_to_h.weight": (h, ffn)}
    if model.gated:
        shapes["gate_h_to_4h.weight"] = (ffn, h)
    if model.attention_bias:
        shapes |= {"query_key_value.bias": (rows,), "dense.bias": (h,)}
    if model.mlp_bias:
        shapes |= {"dense_h_to_4h.bias": (ffn,), "dense_4h_to_h.bias": (h,)}
        if model.gated:
            shapes["gate_h_to_4h.bias"] = (ffn,)
    return shapes


def unit_shapes(config: Config, pp_rank: int) -> list[Shapes]:
    """Parameters of each of a rank's units: embedding, blocks, head with its norm."""
    return _unit_shapes(config.model, config.parallel.tp, share_of(config, pp_rank))


@cache
def _unit_shapes(model: Model, tp: int, share: Share) -> list[Shapes]:
    matrix = (share_of_vocabulary(model.padded_vocab_size, tp), model.hidden_size)
    units: list[Shapes] = [block_shapes(model, tp)] * share.num_layers
    if share.first:
        positions = {"embed_pos.weight": (model.seq_length, model.hidden_size)} if model.pos_emb == "learned" else {}
        units.insert(0, {"embed_in.weight": matrix} | positions)
    if share.last:
        names = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
        head: Shapes = {f"final_layer_norm.{name}": (model.hidden_size,) for name in names}
        tied_here = model.tie_embeddings and share.first
        units.append(head if tied_here else head | {"embed_out.weight": matrix})
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
    return [lay_out(list(unit.values()), world) for unit in _unit_shapes(model, tp, share)]


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
