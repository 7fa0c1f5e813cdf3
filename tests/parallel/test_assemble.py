"""How often blocks are compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from neox_native.config.schema import Compile, Parallel, Training
from neox_native.mesh import build_mesh
from neox_native.parallel.assemble import assemble
from neox_native.plan.dry_run import fake_process_group
from tests.parallel.layouts import CPU, MODEL, fill


def test_sorts_of_blocks_do_not_share_torchs_limit_of_recompilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sorts of blocks, each with and without recomputation, train and evaluate; the layers of one sort share their graph."""
    compiled = []
    compile_with = torch.compile

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_with(function, **options | {"backend": count}))
    torch._dynamo.reset()
    pattern = ["attention", "feed_forward", "attention+feed_forward"]
    model = replace(MODEL, num_layers=12, pattern=pattern)
    training = Training(activation_checkpointing="full", recompute_every=2)
    parallel = Parallel(dp=1)
    with fake_process_group(0, 1):
        (part,) = assemble(model, parallel, training, Compile(True), build_mesh(parallel, CPU)).values()
        fill(part)
    with torch._dynamo.config.patch(recompile_limit=2):  # a monkeypatch would take the setting away when it ends
        for trains in True, False:
            x = torch.randn(1, model.seq_length, model.hidden_size, requires_grad=trains)
            with torch.set_grad_enabled(trains):
                for block in part.layers.values():
                    x = block(x, part.context(model.seq_length, None, None, None))
    assert len(compiled) == len(pattern) * 2 * 2
