"""The mask of packed documents for FlexAttention: torch's own, made without a [T, T] tensor, and one compiled graph for all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from neox_native.model.positions import document_blocks
from neox_native.model.transformer import Transformer
from neox_native.plan.ledger import Ledger
from tests.parallel.layouts import MODEL, fill

TABLES = ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks")


def documents(seq_length: int, in_order: bool = True) -> Tensor:
    draw = torch.Generator().manual_seed(seq_length)
    if not in_order:
        return torch.randint(0, 6, (3, seq_length), generator=draw)
    return (torch.rand(3, seq_length, generator=draw) < 5 / seq_length).long().cumsum(-1)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("seq_length", [64, 128, 1000, 1024])
def test_blocks_are_those_that_torch_finds_in_the_whole_mask(seq_length: int, in_order: bool) -> None:
    ids = documents(seq_length, in_order)
    found = document_blocks(ids)
    whole = create_block_mask(
        lambda b, h, q, k: (k <= q) & (ids[b, q] == ids[b, k]), 3, None, seq_length, seq_length, device="cpu"
    )
    assert found.shape == whole.shape and torch.equal(found.to_dense(), whole.to_dense())
    for name in TABLES:
        mine, theirs = getattr(found, name), getattr(whole, name)
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype == torch.int32


def test_no_tensor_is_as_large_as_the_mask() -> None:
    ids = documents(8192)
    with Ledger({}) as ledger:
        document_blocks(ids)
    assert max(peak.num_bytes for peak in ledger.peaks().values()) < 8192 * 8192 / 100


def test_a_block_is_compiled_once_for_all_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transformer, "attends_in_blocks", lambda *_: True)
    with torch.device("meta"):
        model = Transformer(replace(MODEL, num_layers=1, seq_length=300))
    fill(model)
    (block,), graphs = model.layers.values(), []
    block.compute = torch.compile(
        block.compute, fullgraph=True, dynamic=False, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1]
    )
    tokens = torch.zeros(3, 300, dtype=torch.int64)
    with torch.no_grad():
        for ids in (documents(300), documents(300, in_order=False)):
            model(tokens, documents_BT=ids)
    assert len(graphs) == 1 and "flex_attention" in str(graphs[0].graph)
