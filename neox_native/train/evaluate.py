"""Loss on held-out data, under every layout and schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from neox_native.data.loader import StepBatch
from neox_native.engine.single_stage import Engine
from neox_native.engine.step import Losses, to_device


def evaluate(engine: Engine, losses: Losses, batches: Iterable[StepBatch]) -> tuple[Tensor, int]:
    """This rank's share of the mean loss over `batches` [nats], and their weight on all ranks: their number of targets.

    All targets weigh the same, whichever batch holds them. The share is a tensor on the device; its sum over dp and pp is
    the loss, which is 0 and means nothing where there is no target. Dropout is off meanwhile.
    """
    for part in engine.parts.values():
        part.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=losses.device), 0
    for batch in batches:
        total += engine.forward(to_device(batch.model_fields, losses.device), losses.sums(batch))
        count += losses.objective.weight(batch)
    for part in engine.parts.values():
        part.train()
    num_targets = torch.tensor(count, device=losses.device)
    dist.all_reduce(num_targets, group=losses.mesh.rows.group)
    return total / num_targets.clamp(min=1), int(num_targets.item())


def in_words(loss: float, tokenizer: str) -> str:
    """A mean loss [nats per token] and what it is in the unit by which models of one tokenizer, or of bytes, compare."""
    if tokenizer == "byte":
        return f"{loss:.4f} ({loss / math.log(2):.3f} bits per byte)"
    return f"{loss:.4f} (perplexity {math.exp(min(loss, 700)):.4g})"
