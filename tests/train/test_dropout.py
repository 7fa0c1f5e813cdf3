"""Dropout masks: functions of seed, sample and layer, whatever the layout."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from neox_native.config.schema import Model, Parallel
from neox_native.engine.dropout import DropoutSeeds
from neox_native.model.transformer import Transformer
from tests.ranks import run_ranks
from tests.train.runs import MODELS, batch, compare, config_of, train, whole


@pytest.mark.parametrize(
    "parallel, recompute",
    [
        (Parallel(dp=2, zero_stage=3), "selective"),
        (Parallel(pp=2, dp=1, pipeline_schedule="interleaved_1f1b", virtual_stages=2), "none"),
        (Parallel(pp=2, dp=2, pipeline_schedule="zbv", virtual_stages=2, zero_stage=1), "selective"),
        pytest.param(Parallel(dp=8, zero_stage=2), "none", marks=pytest.mark.slow),
        pytest.param(Parallel(pp=4, dp=2, pipeline_schedule="gpipe"), "full", marks=pytest.mark.slow),
        pytest.param(Parallel(pp=2, dp=1, pipeline_schedule="interleaved_zero_bubble", virtual_stages=2), "full", marks=pytest.mark.slow),
    ],
    ids=str,
)  # fmt: skip
def test_masks_do_not_depend_on_the_layout(parallel, recompute):
    compare(parallel, "dropping", activation_checkpointing=recompute)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [Parallel(dp=2, zero_stage=3), Parallel(pp=2, dp=1)], ids=str)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_masks_of_compiled_blocks_do_not_depend_on_the_layout(parallel, recompute):
    compare(parallel, "dropping", compiled=True, activation_checkpointing=recompute)


@pytest.mark.parametrize(
    "parallel, recompute", [(Parallel(dp=1), "full"), (Parallel(dp=2), "selective"), (Parallel(pp=2, dp=1), "full")], ids=str
)
def test_masks_are_bitwise_those_of_one_process(parallel, recompute):
    """Two microbatches a step: a sum of two numbers has no order."""
    two = {"micro_batch_size": 4, "clip_grad_norm": 0.0}
    ((alone,), parts) = (
        run_ranks(layout.pp * layout.dp, train, config_of(layout, "dropping", activation_checkpointing=kind, **two))
        for layout, kind in ((Parallel(dp=1), "none"), (parallel, recompute))
    )
    expected = whole([alone.weights])
    assert all(torch.equal(weight, expected[name]) for name, weight in whole([part.weights for part in parts]).items())


def seeds_of(dp: int, number: int, seed: int = 1, tp_rank: int = 0, sequence_parallel: bool = False) -> list[list[int]]:
    """For each data rank the seeds of its microbatches of a step, which are of 2 sequences."""
    found = []
    for rank in range(dp):
        mesh = SimpleNamespace(rows=SimpleNamespace(rank=rank, size=dp), tensor=SimpleNamespace(rank=tp_rank))
        config = config_of(Parallel(dp=dp), micro_batch_size=2)
        found.append(DropoutSeeds(mesh, seed, sequence_parallel)(batch(config, number, rank, masked=False)))
    return found


def test_a_microbatch_has_one_seed_whoever_computes_it():
    ((first, second, third, fourth),) = seeds_of(1, 0)
    assert seeds_of(2, 0) == [[first, third], [second, fourth]]
    assert seeds_of(4, 0) == [[first], [second], [third], [fourth]]
    others = [seeds_of(1, 1), seeds_of(1, 0, seed=2), seeds_of(1, 0, tp_rank=1, sequence_parallel=True)]
    drawn = {first, second, third, fourth, *(seed for ((*seeds,),) in others for seed in seeds)}
    assert len(drawn) == 16
    assert seeds_of(1, 0, tp_rank=1) == [[first, second, third, fourth]]


def masks(model: Transformer, tokens_BT: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """What a forward pass drops of the residual stream, in the order in which it does."""
    found: list[torch.Tensor] = []
    modules = [model.dropout, *(block.dropout for block in model.layers.values())]
    hooks = [each.register_forward_hook(lambda _module, _inputs, output: found.append(output == 0)) for each in modules]
    model(tokens_BT, dropout_seed=seed)
    for hook in hooks:
        hook.remove()
    return found


def test_every_place_of_every_microbatch_drops_other_elements():
    tokens_BT = torch.zeros(2, 16, dtype=torch.int64)
    model = Transformer(MODELS["dropping"])
    first, again, second = (masks(model, tokens_BT, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    drawn = [*first, *second]
    assert len(drawn) == 10
    assert not any(torch.equal(one, other) for n, one in enumerate(drawn) for other in drawn[:n])
    part = Transformer(MODELS["dropping"], [2], first=False, last=False)
    assert torch.equal(masks(part, torch.randn(2, 16, 32), 1)[0], first[3]), "a layer drops alike in every part of the model"


def test_weights_of_attention_are_dropped_by_the_seed():
    model: Model = replace(MODELS["dropping"], hidden_dropout=0.0)
    transformer, tokens_BT = Transformer(model), torch.zeros(2, 16, dtype=torch.int64)
    one, again, other = (transformer(tokens_BT, dropout_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
