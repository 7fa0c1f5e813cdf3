"""Blocks that are recomputed under split backward passes: once, to the same gradients, and nothing stays behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from neox_native.model.transformer import Transformer
from neox_native.parallel.recompute import recompute
from neox_native.plan.ledger import Ledger
from tests.parallel.layouts import MODEL, fill


def live_bytes(ledger: Ledger) -> int:
    return sum(storage.num_bytes for reference, storage in ledger.known.values() if reference() is not None)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_split_backward_pass_recomputes_a_block_once_and_keeps_nothing(dropout: float) -> None:
    with torch.device("meta"):
        plain = Transformer(MODEL, range(1, 3), first=False, last=False)
    fill(plain)
    for block in plain.layers.values():
        block.dropout.p = block.attention.attend.dropout.p = dropout
    recomputed, calls = copy.deepcopy(plain), []
    for number, block in recomputed.layers.items():
        forward = block.forward
        block.forward = lambda x, context, f=forward, n=number: (calls.append(n), f(x, context))[1]
        recompute(block, split=True)
    start, gradient = torch.randn(2, 16, 32), torch.randn(2, 16, 32)
    found = {}
    for model in (plain, recomputed):
        left = []
        with Ledger({}) as ledger:
            for _ in range(3):
                x = start.clone().requires_grad_()
                model.zero_grad()
                outputs = [model(x, dropout_seed=1).clone()]
                del calls[:]
                _, groups = stage_backward_input(outputs, [gradient], [x], model.parameters())
                assert len(calls) == (2 if model is recomputed else 0)
                stage_backward_weight(model.parameters(), groups)
                assert len(calls) == (2 if model is recomputed else 0)
                del groups, outputs
                left.append(live_bytes(ledger))
        assert left[1] == left[2]
        found[model] = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    assert len(found[plain]) == len(found[recomputed]) > 20
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[plain], found[recomputed]))
