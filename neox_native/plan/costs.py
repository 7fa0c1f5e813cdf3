"""Traffic, bubble and FLOPs of a layout as closed forms; memory is in `memory.py`. Pure arithmetic, [Note: letters].

A ring collective on n ranks sends (n - 1) / n of the whole tensor for a gather or a reduce-scatter and twice that for
an all-reduce (Patarasuk and Yuan 2009). `plan/dry_run.py` measures the same quantities by running the code, and a test
holds the two together.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from neox_native.config.layout_rules import ZERO_BUBBLE, head_gradients_in_forward
from neox_native.config.schema import Config, Parallel
from neox_native.dtypes import ELEMENT_BYTES, FP32_BYTES, INT64_BYTES
from neox_native.model.flops import model_flops_of_layer, model_flops_of_readout
from neox_native.model.kinds import residual_steps
from neox_native.parallel.cuts import sharers
from neox_native.plan.memory import peak_bytes
from neox_native.plan.shares import (
    Share,
    Sort,
    activation_bytes,
    gradient_bytes,
    layer_costs,
    norm_bytes,
    num_microbatches,
    share_of,
    states_costs,
    stream_bytes,
)
from neox_native.units import share_of_step, size


def ring(num_bytes: int, ranks: int, passes: int = 1) -> int:
    """Bytes that each of `ranks` sends for a gather or reduce-scatter of `num_bytes`; an all-reduce makes two
    passes."""
    return passes * num_bytes * (ranks - 1) // ranks


def passes_of_layer(config: Config, sort: Sort) -> int:
    """How many times one layer sends an activation around the tp ring for one microbatch.

    Each residual step takes, forward and backward together, 2 all-reduces (Shoeybi et al. 2019 §3), or with sequence
    parallelism 2 all-gathers and 2 reduce-scatters, the same volume (Korthikanti et al. 2022 §4.2.2). Full recomputation
    repeats the forward's, but, without dropout there, for the reduction that ends the layer; selective recomputation repeats
    the all-gathers.
    """
    kinds, forgets = sort
    steps, cut = len(residual_steps(kinds, config.model)), config.parallel.sequence_parallel
    reductions = steps - (config.model.hidden_dropout == 0)
    again = {"none": 0, "selective": cut * steps, "full": 2 * reductions + cut * (steps - reductions)}
    return 4 * steps + again[forgets]


def tensor_parallel_bytes(config: Config, pp_rank: int) -> int:
    """What a rank sends over the tp axis in a step: in every microbatch what its layers send, one all-reduce for each end of
    the model, and for each run of the loss three of [b, T] in fp32; and once a step the gradients that are partial."""
    model, training, parallel, share = config.model, config.training, config.parallel, share_of(config, pp_rank)
    layers = sum(passes_of_layer(config, sort) for stage in share.sorts(training) for sort in stage)
    passes = layers + 2 * share.first + 2 * share.last
    if share.first and model.pos_emb in ("learned", "sinusoidal"):
        passes += parallel.sequence_parallel  # reduced whole, cut afterwards
    runs = 1 if head_gradients_in_forward(parallel) else 2
    scores = 3 * runs * ring(training.micro_batch_size * model.seq_length * FP32_BYTES, parallel.tp, 2) * share.last
    per_microbatch = passes * ring(activation_bytes(config), parallel.tp) + scores
    return num_microbatches(config) * per_microbatch + _partial_gradient_bytes(config, share)


def _partial_gradient_bytes(config: Config, share: Share) -> int:
    """What the first data-parallel rank sends once a step: its gradients that are partial sums over tp, and those of
    rows that several ranks hold alike. See [Note: shared heads]."""
    tp, sums = config.parallel.tp, Counter[int]()
    cards = (card for unit in share.cards(config.model) for card in unit)
    for card, slot in zip(cards, share.slots):
        rows = slot.span(0)[1]
        if card.has_partial_gradient(config.parallel.sequence_parallel):
            sums[tp] += gradient_bytes(config) * rows * slot.inner
        if (ranks := sharers(card, tp)) > 1:
            sums[ranks] += gradient_bytes(config) * max(0, rows - card.groups.own // ranks) * slot.inner
    return sum(ring(num_bytes, ranks, 2) for ranks, num_bytes in sums.items())


def data_parallel_bytes(config: Config, pp_rank: int) -> dict[str, int]:
    """What a rank sends over the dp axis in a step, and over its parts, where ZeRO shards inside groups of it. Among the ranks
    of a group, stage 1 reduce-scatters gradients and all-gathers parameters once; 2 reduce-scatters in every microbatch; 3
    also gathers for each pass (Rajbhandari et al. 2020 §7). Once a step, a rank's row of gradients is all-reduced over those
    that hold the same one: in stage 0 all gradients over all of dp. Rows are padded, see [Note: rows and units]. One int64 more
    counts targets."""
    parallel, g, m = config.parallel, gradient_bytes(config), num_microbatches(config)
    e, shards = ELEMENT_BYTES[config.training.precision], parallel.shard_ranks
    units = share_of(config, pp_rank).units
    reductions = m if parallel.zero_stage >= 2 else 1
    gathers = _gathers_of_stage_3(config, pp_rank, len(units)) if parallel.zero_stage == 3 else [1] * len(units)
    matrices = zip(gathers, (unit.world * unit.size for unit in units))
    inside = sum(reductions * ring(g * count, shards) + number * ring(e * count, shards) for number, count in matrices)
    across = sum(ring(g * unit.size, parallel.dp // shards, 2) for unit in units)
    counts = ring(INT64_BYTES, parallel.dp, 2)
    if parallel.zero_shard_size:
        return {"dp": counts, "dp_shard": inside, "dp_replicate": across}
    return {"dp": inside + across + counts}


def _gathers_of_stage_3(config: Config, pp_rank: int, num_units: int) -> list[int]:
    """How often each unit of a rank is gathered in a step: for each forward and each backward pass, but not for an embedding's
    backward pass, nor for that of the last unit where it follows on the forward pass. See [Note: gather]."""
    parallel, m, share = config.parallel, num_microbatches(config), share_of(config, pp_rank)
    warmup = m - 1 if parallel.pipeline_schedule == "gpipe" else min(parallel.pp - 1 - pp_rank, m - 1)
    follow = m - warmup if parallel.pp > 1 else m
    follow = follow if parallel.virtual_stages == 1 else 0
    tied = config.model.tie_embeddings and share.last  # the unit of a tied matrix goes around the whole model
    first = [2 * m - follow if tied else m] if share.first else []
    return [*first, *[2 * m] * (num_units - len(first) - 1), 2 * m - follow]


def point_to_point_bytes(config: Config, pp_rank: int) -> int:
    """What a rank sends to neighbouring stages in a step: every microbatch's residual stream, and its gradient."""
    parallel, stages = config.parallel, share_of(config, pp_rank).stages
    last = parallel.pp * parallel.virtual_stages - 1
    neighbours = [stage + 1 for stage in stages if stage < last] + [stage - 1 for stage in stages if stage > 0]
    sends = sum(neighbour not in stages for neighbour in neighbours)
    return sends * num_microbatches(config) * stream_bytes(config)


def tied_bytes(config: Config, pp_rank: int) -> int:
    """What the first and the last stage send each other in a step, where both hold the embedding matrix: its
    gradients."""
    share = share_of(config, pp_rank)
    if not config.model.tie_embeddings or share.first == share.last:
        return 0
    return ring(gradient_bytes(config) * math.prod(share.slots[0 if share.first else -1].local_shape(0)), 2, 2)


def traffic(config: Config, pp_rank: int) -> dict[str, int]:
    """Bytes that a rank's collectives send in a step, by axis. The gradient's norm goes over "world", or over the one axis
    that is the whole world."""
    parallel = config.parallel
    degrees = {"pp": parallel.pp, "dp": parallel.dp, "tp": parallel.tp}
    sent = {
        "pp": tied_bytes(config, pp_rank),
        **data_parallel_bytes(config, pp_rank),
        "tp": tensor_parallel_bytes(config, pp_rank),
        "world": 0,
    }
    axes = [axis for axis, degree in degrees.items() if degree > 1]
    sent[axes[0] if len(axes) == 1 else "world"] += ring(norm_bytes(config), math.prod(degrees.values()), 2)
    return sent


def bubble_fraction(parallel: Parallel, num_microbatches: int) -> float:
    """Idle time of the pipeline over its compute time, if all stages cost the same and a backward pass costs two
    forwards: (p - 1) / m (Narayanan et al. 2021 §2.2), divided by v where stages are looped (ibid.), and by 3 where
    backward passes are split in two (Qi et al. 2023 §2)."""
    split = 3 if parallel.pipeline_schedule in ZERO_BUBBLE else 1
    return (parallel.pp - 1) / (num_microbatches * parallel.virtual_stages * split) if parallel.pp > 1 else 0.0


def model_flops_of_rank(config: Config, pp_rank: int) -> int:
    """Forward and backward operations of a rank's layers in a step, as MFU counts them. See `model.flops`."""
    model, share = config.model, share_of(config, pp_rank)
    flops = sum(model_flops_of_layer(model, kinds) for stage in share.kinds for kinds in stage)
    flops += model_flops_of_readout(model) if share.last else 0
    tokens = num_microbatches(config) * config.training.micro_batch_size * model.seq_length
    return tokens * flops // config.parallel.tp


def recomputed_flops(config: Config, pp_rank: int) -> int:
    """Operations of matrix products and attention that a rank's layers repeat in a step. In full that is their forward pass,
    which ends before the last output projection unless what that gives is dropped; selective recomputation repeats
    attention that drops."""
    model, share = config.model, share_of(config, pp_rank)
    flops = 0
    for stage in share.sorts(config.training):
        for kinds, forgets in stage:
            costs = layer_costs(model, kinds, config.parallel.tp)
            attention = sum(each.model_flops for each in costs) // 3
            last = costs[-1].products[-1]
            skipped = 0 if model.hidden_dropout else last.inner * last.columns
            products = 2 * (sum(each.multiply_adds for each in costs) - skipped)
            dropped = attention if model.attention_dropout else 0
            flops += {"none": 0, "selective": dropped, "full": products + attention}[forgets]
    tokens = num_microbatches(config) * config.training.micro_batch_size * model.seq_length
    return tokens * flops // config.parallel.tp


@dataclass(frozen=True)
class Prediction:
    """What training's log says beside what it measures: for each number, that of the rank that has most."""

    peak_bytes: int | None
    """Memory, of eager code; None where a layer kind does not state its costs."""
    bytes_by_axis: dict[str, int]
    """Sent by collectives in a step."""
    point_to_point_bytes: int
    """Sent to neighbouring stages in a step."""
    bubble_fraction: float
    recomputed_share: float
    """What is recomputed over the model's own operations; 0 where a layer kind does not state its costs."""

    def sentence(self, with_memory: bool) -> str:
        """For people; memory is a GPU's, which a CPU's process cannot be held against."""
        known = self.peak_bytes is not None
        memory = f"needs {size(self.peak_bytes)} of memory and " if known and with_memory else ""
        sent = self.bytes_by_axis | {"stages": self.point_to_point_bytes}
        sends = ", ".join(f"{axis} {size(number)}" for axis, number in sent.items() if number) or "nothing"
        bubble = f"; the pipeline idles {share_of_step(self.bubble_fraction):.1%} of it" if self.bubble_fraction else ""
        again = f"; recomputation adds {self.recomputed_share:.1%} to its FLOPs" if self.recomputed_share else ""
        silent = "" if known else "; memory is not predicted, for a layer kind of model.pattern does not state its costs"
        return f"predicted: the busiest rank {memory}sends {sends} in a step{bubble}{again}{silent}"


def predict(config: Config) -> Prediction:
    """Closed forms of a resolved config."""
    ranks = range(config.parallel.pp)
    sent = [traffic(config, rank) for rank in ranks]
    known = states_costs(config.model)
    return Prediction(
        peak_bytes=peak_bytes(config) if known else None,
        bytes_by_axis={axis: max(each[axis] for each in sent) for axis in sent[0]},
        point_to_point_bytes=max(point_to_point_bytes(config, rank) for rank in ranks),
        bubble_fraction=bubble_fraction(config.parallel, num_microbatches(config)),
        recomputed_share=max(recomputed_flops(config, each) / model_flops_of_rank(config, each) for each in ranks) if known else 0.0,
    )
