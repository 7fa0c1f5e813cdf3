"""Several tensor-parallel ranks inside one process, so that a debugger can step through a collective."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from neox_native.model.kinds import KINDS
from neox_native.model.transformer import Transformer, cards
from neox_native.parallel import tensor
from tests.parallel.layouts import MODEL, batch, draw, serial

RANKS = 4


@pytest.fixture
def simulated_ranks():
    """A process group of `RANKS` ranks that all live here; every local tensor holds one tensor per rank."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield LocalTensorMode(RANKS)
    dist.destroy_process_group()


@pytest.mark.parametrize("sequence_parallel, async_tp, enclosed", [(False, False, True), (True, False, True), (True, True, True), (True, True, False)])
@pytest.mark.parametrize("size", [1, 2])
def test_simulated_ranks_equal_serial(simulated_ranks, sequence_parallel, async_tp, enclosed, size, monkeypatch):
    """With `async_tp` also where only one of two branches lets its projections be taken out."""
    monkeypatch.setitem(KINDS, "feed_forward", replace(KINDS["feed_forward"], enclosed=enclosed))
    model = replace(MODEL, num_layers=1)
    _, expected = serial(model, 1, size)
    (tokens,), (targets,) = batch(model, 1, size)
    weights = {name: draw(name, model) for name in cards(model)}
    with simulated_ranks:
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
        whole = Transformer(model)
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                parameter.copy_(weights[whole.global_name(name)])
        tensor.apply(whole, mesh, sequence_parallel, async_tp)
        logits = DTensor.from_local(whole(tokens), mesh, [torch.distributed.tensor.Shard(-1)]).full_tensor()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        gradients = {whole.global_name(name): parameter.grad.full_tensor() for name, parameter in whole.named_parameters()}
    for name, gradient in gradients.items():
        for rank, value in gradient._local_tensors.items() if isinstance(gradient, LocalTensor) else [(0, gradient)]:
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=f"{name} on rank {rank}")
