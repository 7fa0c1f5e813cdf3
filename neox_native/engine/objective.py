"""What is minimised: from the model's values per token to a loss, its weight, and named metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from neox_native.config import schema
from neox_native.data.loader import StepBatch
from neox_native.errors import UserError


class Objective(Protocol):
    """A step's loss and metrics are sums over its microbatches, divided by the weight of the step."""

    metrics: tuple[str, ...]
    """Names of what it sums up beside the loss."""

    def weight(self, batch: StepBatch) -> int:
        """What this rank's rows of a step weigh: their number of targets, of pairs, ..."""

    def __call__(self, values_BT: Tensor, fields: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the loss and of each metric over a microbatch.

        Args:
            values_BT: fp32, the negative log-likelihood of each target [nats], 0 where there is none.
            fields: the microbatch's part of the batch's `loss_fields`.
        """


class NextToken:
    """The mean negative log-likelihood of the targets."""

    metrics = ()

    def weight(self, batch: StepBatch) -> int:
        """See `Objective`."""
        return batch.num_targets

    def __call__(self, values_BT: Tensor, fields: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective`."""
        return values_BT.sum(), {}


OBJECTIVES: dict[str, Callable[[schema.Objective], Objective]] = {"next_token": lambda _settings: NextToken()}
"""Makes an objective from its section, by the name that `objective.kind` gives."""


def objective_of(settings: schema.Objective) -> Objective:
    """The objective that the [objective] section names. Raises `UserError` for one that nobody has defined."""
    if settings.kind not in OBJECTIVES:
        raise UserError(f"objective.kind = {settings.kind!r} is none of {', '.join(sorted(OBJECTIVES))}; name one of these.")
    return OBJECTIVES[settings.kind](settings)
