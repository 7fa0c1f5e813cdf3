"""Blocks that are recomputed: to the same gradients, once under split backward passes, with nothing left behind, and with the
memory and the operations that are said."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from neox_native.config.schema import Model
from neox_native.model.transformer import Transformer
from neox_native.parallel.recompute import _drops, recompute, within_budget
from neox_native.plan.ledger import Ledger
from tests.parallel.layouts import MODEL, fill


def live_bytes(ledger: Ledger) -> int:
    return sum(storage.num_bytes for reference, storage in ledger.known.values() if reference() is not None)


def filled(model: Model) -> Transformer:
    with torch.device("meta"):
        whole = Transformer(model)
    fill(whole)
    return whole


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_split_backward_pass_recomputes_a_block_once_and_keeps_nothing(dropout: float, selective: bool) -> None:
    with torch.device("meta"):
        plain = Transformer(MODEL, range(1, 3), first=False, last=False)
    fill(plain)
    for block in plain.layers.values():
        block.dropout.p = block.attention.attend.dropout.p = dropout
    recomputed, calls = copy.deepcopy(plain), []
    for number, block in recomputed.layers.items():
        forward = block.forward
        block.forward = lambda x, context, f=forward, n=number: (calls.append(n), f(x, context))[1]
        recompute(block, selective)
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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"parallel_residual": False, "norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2},
        {"pattern": ["attention", "feed_forward"], "pos_emb": "alibi"},
        {"hidden_dropout": 0.3},
        {"hidden_dropout": 0.3, "attention_dropout": 0.3, "parallel_residual": False},
    ],
    ids=str,
)
def test_selective_recomputation_changes_no_bit_and_repeats_no_product(settings: dict) -> None:
    whole = filled(replace(MODEL, **settings))
    tokens = torch.randint(0, 60, (2, 16))
    found: dict[str, tuple[list[torch.Tensor], int, int]] = {}
    for forgets in ("none", "selective", "full"):
        model = copy.deepcopy(whole)
        for block in model.layers.values():
            if forgets != "none":
                recompute(block, forgets == "selective")
        with Ledger({}) as ledger:
            outputs = model(tokens, dropout_seed=1)
            held = live_bytes(ledger)
            outputs.float().logsumexp(-1).sum().backward()
        found[forgets] = [p.grad for p in model.parameters()], held, ledger.totals.flops
        with torch.no_grad():
            assert torch.equal(model(tokens, dropout_seed=1), outputs)
    for forgets in ("selective", "full"):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found["none"][0], found[forgets][0]))
    assert found["none"][2] == found["selective"][2] < found["full"][2]
    assert found["none"][1] > found["selective"][1] > found["full"][1]


def test_attention_that_drops_is_made_again() -> None:
    """The masks that follow come from the stream that it leaves."""
    for attention in (torch.ops.aten._scaled_dot_product_flash_attention, torch.ops.aten._scaled_dot_product_efficient_attention):
        inputs = [None] * [argument.name for argument in attention.default._schema.arguments].index("dropout_p")
        assert [_drops(attention.default, (*inputs, p), {}) for p in (0.1, 0.0)] == [True, False]
        assert not _drops(attention.default, inputs, {}) and _drops(attention.default, inputs, {"dropout_p": 0.1})


def of_compiled_block(budget: float | None) -> tuple[int, int, list[torch.Tensor]]:
    """Bytes of activations between the passes of a block that torch has partitioned, the products of its backward pass, and the
    gradients."""
    torch._dynamo.reset()
    model, products = filled(replace(MODEL, num_layers=1)), []

    def backward(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable:
        products.extend(node for node in graph.graph.nodes if str(node.target) in ("aten.mm.default", "aten.addmm.default"))
        return make_boxed_func(graph.forward)

    (block,), partition = model.layers.values(), partial(min_cut_rematerialization_partition, compiler="inductor")
    partitioner = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=backward, partition_fn=partition, decompositions=select_decomp_table()
    )
    backend: Callable = partitioner if budget is None else within_budget(budget, partitioner)
    block.compute = torch.compile(block.compute, fullgraph=True, dynamic=False, backend=backend)
    parameters, seen = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = block(x, model.context(16, None, None, None))
    outputs.square().sum().backward()
    return sum(seen.values()), len(products), [p.grad for p in block.parameters()]


def test_a_compiled_block_keeps_what_its_budget_allows() -> None:
    """With a budget of nothing it keeps its input, and the cosines and sines that it shares with all blocks; of its four
    products it makes the two again that its backward pass reads, but not the last."""
    (whole, products, expected), *some = (of_compiled_block(budget) for budget in (None, 0.5, 0.0))
    (half, _, _), (least, again, _) = some
    assert half < 0.65 * whole and least < 0.2 * whole
    assert again == products + 2 == 10
    for _, _, found in some:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected))
