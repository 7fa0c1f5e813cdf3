"""Loss on held-out data, under every layout and schedule."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from neox_native.data.loader import StepBatch
from neox_native.model.transformer import Transformer
from neox_native.train.engine import Engine
from neox_native.train.step import Losses, to_device


def evaluate(engine: Engine, parts: Iterable[Transformer], losses: Losses, batches: Iterable[StepBatch]) -> Tensor:
    """This rank's share of the mean loss per token over `batches` [nats], all batches weighing the same.

    A tensor on the device; the sum over dp and pp is the loss. Dropout is off meanwhile.
    """
    parts = list(parts)
    for part in parts:
        part.eval()
    total, count = torch.zeros((), device=losses.device), 0
    for batch in batches:
        inputs, targets, extras = to_device(batch, losses.device)
        total += engine.forward(inputs, targets, extras, losses.function(batch.num_targets))
        count += 1
    for part in parts:
        part.train()
    return total / max(count, 1)


def evaluation_number(step: int, every: int) -> int:
    """How many evaluations came before the one after `step`: it reads the next stretch of the validation data, in
    every layout and after every resume the same."""
    return -(-step // every) - 1
