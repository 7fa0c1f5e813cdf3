"""Which layers and which stages a pipeline rank has. Pure arithmetic.

[Note: stages] The model is cut into `pp * virtual_stages` stages of consecutive layers. Looped schedules deal them out
in turn, so that rank r runs stages r, r + pp, r + 2 pp, ...; V-shaped ones there and back, stages r and 2 pp - 1 - r.
"""

from __future__ import annotations

from collections.abc import Sequence

from neox_native.config.schema import Model

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


def end_costs(model: Model) -> tuple[float, float]:
    """Cost of the embedding and of the head, in blocks.

    A matrix of P elements costs three products of P multiply-adds per token (forward, input gradient, weight
    gradient). The head pays them all. The embedding multiplies nothing, but writes its gradient and is updated like
    any weight: one third.
    """
    kv_share = (model.num_heads + 2 * model.kv_heads) / model.num_heads
    projections = model.hidden_size**2 * (kv_share + 1)
    feed_forward = model.hidden_size * model.ffn_size * (3 if model.gated else 2)
    scores = model.hidden_size * model.seq_length  # two products of T / 2 keys on average
    head = model.hidden_size * model.padded_vocab_size / (projections + feed_forward + scores)
    return head / 3, head


def layers_per_stage(num_layers: int, num_stages: int, first_cost: float, last_cost: float) -> list[int]:
    """Layers of each stage such that the dearest stage is as cheap as can be; no stage is empty.

    Args:
        first_cost: what the first stage carries beside its layers, in layers.
        last_cost: what the last stage carries beside its layers, in layers.
    """
    assert num_layers >= num_stages, (num_layers, num_stages)
    counts, costs = [1] * num_stages, [1.0] * num_stages
    costs[0] += first_cost
    costs[-1] += last_cost
    for _ in range(num_layers - num_stages):
        cheapest = min(range(num_stages), key=lambda stage: (costs[stage], stage))
        counts[cheapest] += 1
        costs[cheapest] += 1.0
    return counts


def stage_layers(model: Model, num_stages: int, explicit: Sequence[int] = ()) -> list[range]:
    """Global layer numbers of each stage, first to last.

    Args:
        explicit: layers of each stage as the user wants them; empty balances them.
    """
    counts = list(explicit) or layers_per_stage(model.num_layers, num_stages, *end_costs(model))
    assert (len(counts), sum(counts)) == (num_stages, model.num_layers), (counts, num_stages, model.num_layers)
    starts = [sum(counts[:stage]) for stage in range(num_stages + 1)]
    return [range(start, end) for start, end in zip(starts, starts[1:])]
