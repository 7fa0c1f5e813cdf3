"""Blocks whose tensor-parallel collectives can run piece by piece: what torch's compiler finds in them, and that their numbers are
those of other blocks."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx, virtualized
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch.distributed import _symmetric_memory as symmetric
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from neox_native.config.schema import Compile, Model, Parallel, Training
from neox_native.errors import UserError
from neox_native.mesh import build_mesh
from neox_native.parallel import async_tp
from neox_native.parallel.assemble import assemble
from tests.parallel.layouts import CPU, MODEL, fill
from tests.parallel.test_twins import MODELS
from tests.train.runs import compare

GATHERED, SCATTERED = "symm_mem.fused_all_gather_matmul.default", "symm_mem.fused_matmul_reduce_scatter.default"
LEFT = ("_c10d_functional.all_gather_into_tensor.default", "_c10d_functional.reduce_scatter_tensor.default")


@contextmanager
def a_rank_of(tp: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parallel]:
    """The first of `tp` ranks that do not exist, whose GPUs would read each other's memory."""
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)  # asked by torch's pass
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda mine, other: other < 4)
    monkeypatch.setattr(symmetric, "_group_name_to_store", {})
    monkeypatch.setattr(symmetric, "_SymmetricMemory", Mock())  # it keeps the names of groups that are gone
    dist.init_process_group("fake", rank=0, world_size=tp, store=FakeStore())
    try:
        yield Parallel(tp=tp, dp=1, sequence_parallel=True, async_tp=True)
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # what it remembers of an equal mesh names a group that is gone


def changed(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
    """A graph after Inductor's passes."""
    view_to_reshape(graph)
    with warnings.catch_warnings(), torch.no_grad(), virtualized.V.set_fake_mode(compile_fx.fake_tensor_prop(graph, inputs)):
        warnings.filterwarnings("ignore", "erase_node")  # torch 2.11 erases a product twice
        post_grad_passes(graph, is_inference=False)
    graph.recompile()
    return graph


def calls(graph: torch.fx.GraphModule) -> Counter[str]:
    """How often it calls each operation."""
    return Counter(str(node.target) for node in graph.graph.nodes)


class Found(NamedTuple):
    """What one of Inductor's graphs is like, once its passes are through."""

    calls: Counter[str]
    made: list[int]
    """Elements of each output that it computes."""


def found_in_block(model: Model, tp: int, rows: int, recompute: str, monkeypatch: pytest.MonkeyPatch) -> list[Found]:
    """The forward and the backward graph of the blocks, compiled once for more than torch would compile one by one. They run as
    they were before Inductor's passes."""
    found: list[Found] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor], **_: object) -> Callable:
        outputs = [node for node in graph.graph.output_node().all_input_nodes if node.op != "placeholder"]
        made = [node.meta["val"].numel() for node in outputs]
        found.append(Found(calls(changed(copy.deepcopy(graph), inputs)), made))
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(compile_fx, "compile_fx", partial(compile_fx.compile_fx, inner_compile=count))
    torch._dynamo.reset()
    layers = torch._dynamo.config.recompile_limit + 1
    with a_rank_of(tp, monkeypatch) as parallel:
        mesh = build_mesh(parallel, CPU)
        async_tp.share_memory(mesh.tensor, ["here"] * tp)
        training = Training(activation_checkpointing=recompute)
        (part,) = assemble(replace(model, num_layers=layers), parallel, training, Compile(True), mesh).values()
        fill(part)
        x = torch.randn(rows, model.seq_length // tp, model.hidden_size, requires_grad=True)
        for block in part.layers.values():
            x = block(x, part.context(model.seq_length, None, None, None))
        x.sum().backward()
    return found


def check_products(name: str, tp: int, rows: int, recompute: str, monkeypatch: pytest.MonkeyPatch) -> list[Found]:
    """Each residual step gathers and scatters once in each pass, and gathers again what full recomputation makes again: its input,
    and what a step but the last adds up."""
    forward, backward = found_in_block(MODELS[name], tp, rows, recompute, monkeypatch)
    steps, again = 1 if MODELS[name].parallel_residual else 2, recompute == "full"
    assert forward.calls[GATHERED] == forward.calls[SCATTERED] == steps
    assert backward.calls[GATHERED] == (2 if again else 1) * steps
    assert backward.calls[SCATTERED] == steps + again * (steps - 1)
    assert not any(graph.calls[collective] for graph in (forward, backward) for collective in LEFT)
    return [forward, backward]


def test_every_collective_of_a_block_has_its_product(monkeypatch):
    """And what it keeps are activations: weights that it scaled and put together are made again."""
    tp, rows = 2, 3
    forward, _ = check_products("parallel", tp, rows, "none", monkeypatch)
    assert not [number for number in forward.made if number % (rows * MODEL.seq_length // tp)]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("tp, rows", [(2, 3), (4, 1), (4, 2)])
@pytest.mark.parametrize("name", ["parallel", "sequential", "gated grouped rmsnorm"])
def test_every_collective_of_any_block_has_its_product(name, tp, rows, recompute, monkeypatch):
    check_products(name, tp, rows, recompute, monkeypatch)


def test_every_collective_of_two_steps_and_one_row_has_its_product(monkeypatch):
    check_products("sequential", 4, 1, "selective", monkeypatch)


@pytest.mark.parametrize("mesh, stage, model", [((1, 2, 2), 3, "sequential"), ((2, 1, 2), 0, "parallel"), ((1, 1, 2), 0, "one key head")], ids=str)
def test_numbers_are_those_of_one_process(mesh, stage, model, monkeypatch):
    """The block that is compiled on a GPU, run as it is."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    compare(Parallel(*mesh, sequence_parallel=True, zero_stage=stage, async_tp=True), model, compiled=True, micro_batch_size=2 if stage else 1)


@pytest.mark.slow
@pytest.mark.parametrize("model, rows, recompute", [("parallel", 2, "none"), ("sequential", 1, "selective"), ("one key head", 2, "full")])
def test_what_the_compiler_makes_of_it_has_the_numbers_of_one_process(model, rows, recompute, monkeypatch):
    """The compiler's graphs, in which torch's own references stand for the kernels that send and multiply in pieces."""

    def run(graph: torch.fx.GraphModule, inputs: list[Tensor], **_: object) -> Callable:
        assert not any(calls(changed(graph, inputs))[collective] for collective in LEFT)
        return make_boxed_func(graph.forward)

    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(compile_fx, "compile_fx", partial(compile_fx.compile_fx, inner_compile=run))
    parallel = Parallel(tp=2, dp=1, sequence_parallel=True, async_tp=True)
    with torch.library._scoped_library("symm_mem", "IMPL") as library, symmetric._test_mode():
        library.impl("fused_all_gather_matmul", symmetric._fused_all_gather_matmul_fallback, "CPU")
        library.impl("fused_matmul_reduce_scatter", symmetric._fused_matmul_reduce_scatter_fallback, "CPU")
        compare(parallel, model, compiled=True, micro_batch_size=rows, activation_checkpointing=recompute)


@pytest.mark.parametrize("hosts, words", [(["a", "a", "a", "a", "b", "b"], "ranks [0, 1, 2, 3, 4, 5] on a, b"), (["a"] * 6, "on a do not")])
def test_gpus_that_cannot_read_each_others_memory_are_refused(hosts, words, monkeypatch):
    with a_rank_of(len(hosts), monkeypatch) as parallel, pytest.raises(UserError) as refused:
        async_tp.share_memory(build_mesh(parallel, CPU).tensor, hosts)
    assert "parallel.async_tp = true" in str(refused.value) and words in str(refused.value)
    assert not symmetric._group_name_to_store
