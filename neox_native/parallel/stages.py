"""Which layers and which stages a pipeline rank has. Pure arithmetic.

[Note: stages] The model is cut into `pp * virtual_stages` stages of consecutive layers. Looped schedules deal them out
in turn, so that rank r runs stages r, r + pp, r + 2 pp, ...; V-shaped ones there and back, stages r and 2 pp - 1 - r.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache

from neox_native.config.schema import Model
from neox_native.model.flops import flops_of_layer
from neox_native.model.kinds import kinds_of_layers

V_SHAPED = ("zbv",)


def stages_of_rank(pp_rank: int, pp: int, virtual_stages: int, schedule: str) -> list[int]:
    """Global numbers of the stages that a pipeline rank runs, first to last."""
    if schedule in V_SHAPED:
        return [pp_rank, 2 * pp - 1 - pp_rank]
    return [pp_rank + turn * pp for turn in range(virtual_stages)]


def rank_of_stage(stage: int, pp: int, schedule: str) -> int:
    """The pipeline rank that runs a stage."""
    if schedule in V_SHAPED and stage >= pp:
        return 2 * pp - 1 - stage
    return stage % pp


def stage_costs(model: Model) -> tuple[list[int], int, int]:
    """Operations per token of training each layer, the embedding and the head.

    The head pays for three products per token (forward, gradient of the input, gradient of the weight). The embedding
    multiplies nothing, but writes its gradient and is updated like any weight: one third.
    """
    layers = [flops_of_layer(model, kinds) for kinds in kinds_of_layers(model)]
    product = 2 * model.hidden_size * model.padded_vocab_size
    return layers, product, 3 * product


def layers_per_stage(layers: Sequence[float], num_stages: int, first: float, last: float) -> list[int]:
    """How many consecutive layers each stage has, such that the dearest stage is as cheap as can be; no stage is empty. Among
    equally good partitions the one with the least sum of squares wins, then the one whose early stages have more.

    Args:
        layers: the cost of each layer.
        first: what the first stage carries beside its layers.
        last: what the last stage carries beside its layers.
    """
    assert len(layers) >= num_stages, (len(layers), num_stages)
    upto = [0, *itertools.accumulate(layers)]

    @cache
    def best(stage: int, start: int) -> tuple[float, float, tuple[int, ...]]:
        """The best partition of the layers from `start` on among the stages from `stage` on: its dearest stage, the sum of
        squares, and the numbers of layers, negative."""
        later = num_stages - 1 - stage
        found = (math.inf, math.inf, ())
        for end in range(start + 1, len(layers) - later + 1) if later else [len(layers)]:
            cost = upto[end] - upto[start] + (first if stage == 0 else 0) + (0 if later else last)
            if cost > found[0]:
                break  # and so is every stage of more layers
            dearest, squares, counts = best(stage + 1, end) if later else (0, 0, ())
            found = min(found, (max(cost, dearest), cost**2 + squares, (start - end, *counts)))
        return found

    return [-count for count in best(0, 0)[-1]]


@cache
def _balanced(model: Model, num_stages: int) -> list[int]:
    layers, first, last = stage_costs(model)
    return layers_per_stage(layers, num_stages, first, last)


def stage_layers(model: Model, num_stages: int, explicit: Sequence[int] = ()) -> list[range]:
    """Global layer numbers of each stage, first to last.

    Args:
        explicit: layers of each stage as the user wants them; empty balances them.
    """
    counts = list(explicit) or _balanced(model, num_stages)
    assert (len(counts), sum(counts)) == (num_stages, model.num_layers), (counts, num_stages, model.num_layers)
    starts = [sum(counts[:stage]) for stage in range(num_stages + 1)]
    return [range(start, end) for start, end in zip(starts, starts[1:])]
