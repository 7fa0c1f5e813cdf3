"""Rules about the layout: what a mesh, tensor parallelism, a pipeline schedule and ZeRO need of the other settings.

Each rule looks at a config and the number of ranks, and says in sentences what cannot work. A degree of 1 asks for
nothing, so that one file serves every mesh: see `IDLE_AT_1` and `in_use`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from neox_native.config.rules import divisors_around
from neox_native.config.schema import Config, Parallel

LOOPED = ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble")
IN_ROUNDS = ("interleaved_1f1b", "interleaved_zero_bubble")
ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv")
FORWARD_FIRST = ("gpipe", "looped_bfs")
"""Schedules in which all microbatches wait for their backward passes at once."""
IDLE_AT_1 = {
    "pp": ("pipeline_schedule", "virtual_stages", "stage_layers"),
    "dp": ("zero_stage", "zero_shard_size"),
    "tp": ("sequence_parallel", "async_tp"),
}
"""The settings of [parallel] that are ignored where an axis has one rank."""


def head_gradients_in_forward(parallel: Parallel) -> bool:
    """Whether the forward pass makes the head's gradients and keeps them, [Note: slices] in `model/cross_entropy.py`: not where
    every microbatch of a step would keep one of the whole matrix; there the backward pass repeats a product."""
    return parallel.pp == 1 or parallel.pipeline_schedule not in FORWARD_FIRST


def degree_left(parallel: Parallel, world_size: int) -> int | None:
    """The data-parallel degree of world_size ranks, or None where the mesh does not fit them."""
    rest, remainder = divmod(world_size, parallel.pp * parallel.tp)
    fits = remainder == 0 and rest >= 1 and parallel.dp in (-1, rest)
    return rest if fits else None


def in_use(parallel: Parallel) -> Parallel:
    """The section with its defaults for what its mesh ignores, so that nothing behind sees it; dp must be resolved."""
    defaults = Parallel()
    idle = [name for axis, names in IDLE_AT_1.items() if getattr(parallel, axis) == 1 for name in names]
    used = replace(parallel, **{name: getattr(defaults, name) for name in idle})
    return replace(used, zero_shard_size=0) if used.shard_ranks in (1, used.dp) else used


def mesh(config: Config, world_size: int) -> Iterator[str]:
    """pp * dp * tp is the number of ranks."""
    pp, dp, tp = config.parallel.pp, config.parallel.dp, config.parallel.tp
    if degree_left(config.parallel, world_size) is not None:
        return
    started = f"torchrun started {world_size}" if world_size > 1 else "this is 1 process, not started by torchrun"
    if dp == -1:
        yield (
            f"pp({pp}) * tp({tp}) = {pp * tp} does not divide the ranks: {started}; start a multiple of {pp * tp} "
            "or lower parallel.pp or parallel.tp."
        )
        return
    rest, remainder = divmod(world_size, pp * tp)
    way_out = f", or set parallel.dp = {rest}, or -1, which takes the ranks there are" if remainder == 0 and rest else ""
    yield (
        f"pp({pp}) * dp({dp}) * tp({tp}) = {pp * dp * tp} ranks, but {started}; "
        f"start {pp * dp * tp} (torchrun's --nnodes times --nproc-per-node){way_out}."
    )


def batch(config: Config, world_size: int) -> Iterator[str]:
    """A step is a whole number of microbatches on every data-parallel rank."""
    dp = degree_left(config.parallel, world_size)
    if dp is None:
        return
    size, micro = config.training.global_batch_size, config.training.micro_batch_size
    if size % (micro * dp):
        above = -(-size // (micro * dp)) * micro * dp
        near = f"{above - micro * dp} and {above}" if above > micro * dp else f"{above}"
        some = divisors_around(size // micro, dp, config.parallel.pp * config.parallel.tp).replace("and", "or")
        ranks = f"; for this batch, take {some} ranks" if size % micro == 0 else ""
        yield (
            f"training.global_batch_size = {size} is no multiple of micro_batch_size({micro}) * dp({dp}) = "
            f"{micro * dp}; the nearest that are: {near}{ranks}."
        )


def tensor_parallel(config: Config, world_size: int) -> Iterator[str]:
    """Heads, feed-forward layer and sequence can be cut into tp equal parts; key-value heads are cut or shared as a whole;
    the last part of the vocabulary may be short, but not empty."""
    model, tp = config.model, config.parallel.tp
    cut = [("model.num_heads", model.num_heads, ""), ("model.ffn_hidden_size", model.ffn_size, "")]
    if config.parallel.sequence_parallel:
        cut.append(("model.seq_length", model.seq_length, ", or parallel.sequence_parallel = false"))
    for name, size, way_out in cut:
        if size % tp:
            yield f"parallel.tp = {tp} does not divide {name} = {size}; set parallel.tp to a divisor of {size}{way_out}."
    heads, shared, rows = model.num_heads, model.kv_heads, model.padded_vocab_size
    if heads % tp == 0 and shared % tp and tp % shared:
        fitting = [d for d in range(1, heads + 1) if heads % d == 0 and (shared % d == 0 or d % shared == 0)]
        near = f"{max(d for d in fitting if d < tp)} and {min(d for d in fitting if d > tp)}"
        yield (
            f"parallel.tp = {tp} neither divides model.num_kv_heads = {shared} nor is a multiple of it; the nearest degrees "
            f"that are one of the two are {near}."
        )
    if -(-rows // tp) * (tp - 1) >= rows:
        yield (
            f"the padded vocabulary = {rows} leaves a rank of parallel.tp = {tp} without a row; lower parallel.tp or raise "
            f"model.vocab_multiple_of (now {model.vocab_multiple_of})."
        )


def stages(config: Config, world_size: int) -> Iterator[str]:
    """The schedule can have so many stages per rank, and the layers can fill them."""
    parallel, layers = config.parallel, config.model.num_layers
    pp, virtual, schedule = parallel.pp, parallel.virtual_stages, parallel.pipeline_schedule
    if schedule == "zbv" and virtual != 2:
        yield (
            f'parallel.pipeline_schedule = "zbv" runs exactly 2 stages per rank, but parallel.virtual_stages = '
            f"{virtual}; set it to 2."
        )
    elif schedule not in (*LOOPED, "zbv") and virtual > 1:
        yield (
            f'parallel.pipeline_schedule = "{schedule}" runs 1 stage per rank, but parallel.virtual_stages = '
            f"{virtual}; set it to 1, or take a looped schedule: {', '.join(LOOPED)}."
        )
    elif schedule in LOOPED and virtual < 2:
        yield (
            f'parallel.pipeline_schedule = "{schedule}" runs 2 or more stages per rank, but parallel.virtual_stages = '
            f'{virtual}; set it to 2, or take "1f1b".'
        )
    if layers < pp * virtual:
        yield (
            f"model.num_layers = {layers} cannot fill pp({pp}) * virtual_stages({virtual}) = {pp * virtual} stages; "
            "lower parallel.pp or parallel.virtual_stages."
        )
    given = parallel.stage_layers
    if given and (len(given) != pp * virtual or sum(given) != layers):
        yield (
            f"parallel.stage_layers = {given} has {len(given)} stages and {sum(given)} layers, but pp({pp}) * "
            f"virtual_stages({virtual}) = {pp * virtual} and model.num_layers = {layers}; mend it, or leave it empty."
        )


def schedule_microbatches(config: Config, world_size: int) -> Iterator[str]:
    """A step has the microbatches that the schedule needs (as torch's schedules demand them). Where mesh or batch do not divide,
    their own rules speak."""
    parallel, training, dp = config.parallel, config.training, degree_left(config.parallel, world_size)
    pp, schedule, size, micro = parallel.pp, parallel.pipeline_schedule, training.global_batch_size, training.micro_batch_size
    if dp is None or size % (micro * dp):
        return
    count = training.num_microbatches(dp)
    counted = f"global_batch_size({size}) / (micro_batch_size({micro}) * dp({dp})) = {count}"
    if schedule == "1f1b" and count < pp:
        yield (
            f'parallel.pipeline_schedule = "1f1b" needs at least as many microbatches per step as stages, but '
            f"{counted} and parallel.pp = {pp}; "
            'lower training.micro_batch_size, raise training.global_batch_size, or take "gpipe".'
        )
    rounds = max(1, count // pp)
    if schedule in IN_ROUNDS and count % rounds:
        yield (
            f'parallel.pipeline_schedule = "{schedule}" runs its microbatches in {rounds} equal rounds, but '
            f"{counted}; make them a multiple of parallel.pp = {pp}, such as "
            f"{rounds * pp} or {rounds * pp + pp}, by training.global_batch_size or micro_batch_size."
        )


def shard_groups(config: Config, world_size: int) -> Iterator[str]:
    """ZeRO's groups are of one size and cover the data-parallel ranks."""
    size, dp = config.parallel.zero_shard_size, degree_left(config.parallel, world_size)
    if size and dp is not None and dp % size:
        what = "is larger than" if size > dp else "does not divide"
        some = divisors_around(dp, size).removeprefix("1 and ").replace("and", "or")
        yield (
            f"parallel.zero_shard_size = {size} {what} the {dp} data-parallel ranks; set it to {some}, or to 0, which shards "
            "over all of them."
        )


def zero_bubble(config: Config, world_size: int) -> Iterator[str]:
    """A backward pass split in two cannot be compiled, or reduced as it runs."""
    parallel = config.parallel
    if parallel.pipeline_schedule not in ZERO_BUBBLE:
        return
    name = f'parallel.pipeline_schedule = "{parallel.pipeline_schedule}"'
    other = 'or take the schedule "interleaved_1f1b"'
    if config.compile.on:
        yield f"{name} splits the backward pass, which compile.enabled = true cannot; set it to false, {other}."
    if parallel.zero_stage >= 2:
        yield (
            f"{name} splits the backward pass, so that gradients are not final when a block has run, and "
            f"parallel.zero_stage = {parallel.zero_stage} would reduce them there; set it to 0 or 1, {other}."
        )


def async_tensor_parallel(config: Config, world_size: int) -> Iterator[str]:
    """What runs beside pieces of matrix products are the collectives of sequence parallelism, and it is the compiler that cuts."""
    parallel = config.parallel
    if parallel.async_tp and not parallel.sequence_parallel:
        yield (
            "parallel.async_tp = true cuts the all-gathers and reduce-scatters of sequence parallelism in pieces, but "
            "parallel.sequence_parallel = false; set it to true, or parallel.async_tp = false."
        )
    if parallel.async_tp and config.compile.enabled is False:
        yield (
            "parallel.async_tp = true is done by torch's compiler, but compile.enabled = false; set it to true, or "
            "parallel.async_tp = false."
        )
