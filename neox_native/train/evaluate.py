"""Loss on held-out data, under every layout and schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist

from neox_native.data.loader import StepBatch
from neox_native.engine.single_stage import Engine
from neox_native.engine.step import Losses, to_device


def evaluate(engine: Engine, losses: Losses, batches: Iterable[StepBatch]) -> float | None:
    """The mean loss over `batches` [nats], the same on all ranks; None where they have no target. A collective.

    All targets weigh the same, whichever batch holds them. Dropout is off meanwhile.
    """
    for part in engine.parts.values():
        part.eval()
    shares, count = [], 0
    for batch in batches:
        shares.append(losses.sums.share(engine.forward(to_device(batch.model_fields, losses.device), losses.sums_of(batch)).double()))
        count += losses.objective.weight(batch)
    for part in engine.parts.values():
        part.train()
    weight = torch.tensor(count, device=losses.device)
    dist.all_reduce(weight, group=losses.mesh.rows.group)
    total = losses.total(torch.stack(shares).sum(dim=0))
    return (total / weight).item() if weight else None


def in_words(loss: float, tokenizer: str) -> str:
    """A mean loss [nats per token] and what it is in the unit by which models of one tokenizer, or of bytes, compare."""
    if tokenizer == "byte":
        return f"{loss:.4f} ({loss / math.log(2):.3f} bits per byte)"
    return f"{loss:.4f} (perplexity {math.exp(min(loss, 700)):.4g})"
