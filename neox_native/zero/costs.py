"""What a stage costs: bytes held between steps and moved in one, as closed forms over the layout with its padding."""

from __future__ import annotations

from dataclasses import dataclass, fields

from neox_native.dtypes import FP32_BYTES
from neox_native.zero.layout import Layout, ZeroStage


@dataclass(frozen=True)
class Costs:
    """Bytes of one rank; costs of units add up."""

    parameters: int = 0
    """Held: what the model reads, or this rank's row of it."""
    gradients: int = 0
    """Held: fp32 matrix, or this rank's row of it."""
    masters: int = 0
    """Held: fp32 master weights that are not the parameters themselves."""
    optimizer: int = 0
    """Held: moments."""
    gathered: int = 0
    """Received per step in all-gathers of parameters."""
    reduced: int = 0
    """Received per step in reductions of gradients over dp."""

    def __add__(self, other: Costs) -> Costs:
        return Costs(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    @property
    def held(self) -> int:
        """Bytes between steps."""
        return self.parameters + self.gradients + self.masters + self.optimizer

    @property
    def moved(self) -> int:
        """Bytes received over dp per step; as many are sent."""
        return self.gathered + self.reduced


def unit_costs(
    layout: Layout,
    trained: Layout,
    stage: ZeroStage,
    dp: int,
    rank: int,
    param_bytes: int,
    num_moments: int,
    num_microbatches: int,
) -> Costs:
    """Costs of a unit.

    With P parameters and d ranks, a row of S elements is P / d, so that (d - 1) S is the textbook's P (d - 1) / d:
    ZeRO-1 moves 2 P per step, ZeRO-2 (m + 1) P, ZeRO-3 3 P per microbatch (Rajbhandari et al. 2020 §7).

    Args:
        layout, trained: all parameters of the unit, and the trainable ones.
        dp: data-parallel ranks.
        rank: this rank's row.
        param_bytes: size of an element of the parameters.
        num_moments: tensors of optimizer state per parameter.
        num_microbatches: m, microbatches per step.
    """
    own_master = param_bytes == FP32_BYTES and stage < ZeroStage.PARAMETERS
    whole = sum(layout.world * slot.width for slot in layout.slots) * param_bytes
    row = 0 if param_bytes == FP32_BYTES else layout.size * param_bytes
    rows_of_gradients = trained.world if stage <= ZeroStage.OPTIMIZER else 1
    reductions = num_microbatches if stage >= ZeroStage.GRADIENTS else 1
    reduced = reductions * (dp - 1) * trained.size * FP32_BYTES
    gathered = (dp - 1) * trained.size * param_bytes
    if stage == ZeroStage.NONE:  # an all-reduce is a reduce-scatter and an all-gather, here of one row of P
        gathered, reduced = 0, 2 * reduced // dp
    elif stage == ZeroStage.PARAMETERS:
        gathered = 2 * num_microbatches * (dp - 1) * layout.size * param_bytes
    return Costs(
        parameters=row if stage == ZeroStage.PARAMETERS else whole,
        gradients=rows_of_gradients * trained.size * FP32_BYTES,
        masters=0 if own_master else layout.size * FP32_BYTES,
        optimizer=num_moments * trained.local_elements(rank) * FP32_BYTES,
        gathered=gathered,
        reduced=reduced,
    )
