"""What a tensor-parallel block communicates, counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from neox_native.config.schema import Compile, Model, Parallel, Training
from neox_native.mesh import build_mesh
from neox_native.model.cross_entropy import CrossEntropy
from neox_native.model.parameters import vector
from neox_native.parallel.assemble import assemble
from neox_native.parallel.loss import RanksOfVocabulary
from neox_native.parallel.tensor import kind_rules
from tests.parallel.layouts import CPU, MODEL, batch, fill
from tests.ranks import run_ranks

TP = 2


class Bytes(TorchDispatchMode):
    """Adds up the size of the whole tensor that each functional collective gathers, scatters or reduces."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if function.namespace == "_c10d_functional" and name.startswith(("all_", "reduce_")):
            larger = max(args[0], result, key=lambda tensor: tensor.numel())
            self.of[name] = self.of.get(name, 0) + larger.numel() * larger.element_size()
        return result


def counting() -> CommDebugMode:
    """torch's counter without its table of modules: a module that is called twice breaks it, and its backward hooks make
    collectives of their own."""
    mode = CommDebugMode()
    tracker = mode.advanced_module_tracker
    tracker.__enter__, tracker.__exit__ = lambda: None, lambda *_: None
    tracker.name, tracker.module_parents_dict = "Global", {"Global": set()}
    return mode


def count(model: Model, sequence_parallel: bool) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Collectives of one microbatch, forward and backward, and their bytes together."""
    parallel = Parallel(tp=TP, dp=1, sequence_parallel=sequence_parallel)
    (part,) = assemble(model, parallel, Training(), Compile(), build_mesh(parallel, CPU)).values()
    fill(part)
    tokens, _ = batch(model, 1, 2)
    with Bytes() as volume:
        with counting() as forward:
            logits = part(tokens[0])
        with counting() as backward:
            logits.sum().backward()
    names = [{str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()} for mode in (forward, backward)]
    return *names, volume.of


@pytest.mark.parametrize("residual, passes", [("parallel", 1), ("sequential", 2)])
def test_blocks_communicate_once_per_residual_step(residual, passes):
    model = replace(MODEL, parallel_residual=residual == "parallel")
    blocks = passes * model.num_layers
    activation_bytes = 2 * model.seq_length * model.hidden_size * 4

    forward, backward, volume = run_ranks(TP, count, model, False)[0]
    assert forward == {"all_reduce": blocks + 1}  # + the embedding's
    assert backward == {"all_reduce": blocks + 1}  # + the final norm's
    assert volume == {"all_reduce": 2 * (blocks + 1) * activation_bytes}

    forward, backward, volume = run_ranks(TP, count, model, True)[0]
    assert forward == {"all_gather_into_tensor": blocks + 1, "reduce_scatter_tensor": blocks + 1}
    assert backward == forward
    assert volume == {name: 2 * (blocks + 1) * activation_bytes for name in forward}


def loss_collectives(model: Model) -> list[int]:
    """Sizes of what the readout of 2 rows, in slices of 48 tokens, hands to collectives in its forward and backward pass
    [elements]."""
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def noting(tensor, *arguments, **keywords):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *arguments, **keywords)

    dist.all_reduce = noting
    loss, rows = CrossEntropy(), model.padded_vocab_size // TP
    loss.slice_tokens, loss.holder = 48, RanksOfVocabulary(dist.group.WORLD, rows)
    x, weight = torch.zeros(2, model.seq_length, 8, requires_grad=True), torch.zeros(rows, 8, requires_grad=True)
    loss(x, weight, batch(model, 1, 2)[1][0]).sum().backward()
    return sizes


def test_the_logits_are_never_gathered():
    sizes = run_ranks(TP, loss_collectives, MODEL)[0]
    slices = [min(48, 2 * MODEL.seq_length - start) for start in range(0, 2 * MODEL.seq_length, 48)]
    assert sizes == [number * times for number in slices for times in (1, 2)]  # the largest; the sum and the target's


def test_a_cut_that_no_module_makes_is_not_ignored() -> None:
    with pytest.raises(AssertionError, match="no module cuts scale"):
        dict(kind_rules({"scale": vector(8, 1.0, cut=0)}))
