"""Tensor parallelism as data: one dict from module name to what happens there, made from cards and seams.

[Note: tensor parallelism] Over the tp axis a block's first projections are cut by output rows (column-wise) and its
last ones by input columns (row-wise), so that only the block's input and the sum of its outputs are communicated
(Shoeybi et al. 2019 §3). Let L be the layout of the residual stream: Replicate, or Shard(1), the sequence cut, with
sequence parallelism (Korthikanti et al. 2022 §4.2.2). Then, once for all branches that read the same x:

    x in L -> x̂ = normalize(x) in L -> x̂ whole        the `f` operator: identity, or all-gather
    branches on whole heads and slices of the feed-forward layer -> partial sums
    sum of the branches -> reduced to L -> + biases    the `g` operator: all-reduce, or reduce-scatter

and the backward pass runs each communication's transpose. The parallel residual does this once per block, the
sequential residual twice. Activations are DTensors only between those seams; residual stream, attention and
activation function see plain local tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)

from neox_native.config.schema import Model
from neox_native.model.auxiliary import AuxiliaryLoss
from neox_native.model.kinds import Kind, kinds_of_layers
from neox_native.model.parameters import Cards
from neox_native.model.transformer import Transformer
from neox_native.parallel.async_tp import Laid, OneProduct
from neox_native.parallel.cuts import share_of_vocabulary
from neox_native.parallel.loss import RanksOfVocabulary


class Replicated(ParallelStyle):
    """Every rank keeps the whole parameters, as DTensors, so that they meet DTensor activations. With
    `local_activations`, plain inputs and outputs are the same whole tensor on every rank."""

    def __init__(self, local_activations: bool = False):
        super().__init__()
        self.local_activations = local_activations

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def replicate(_name: str, submodule: nn.Module, mesh: DeviceMesh) -> None:
            for name, parameter in submodule.named_parameters(recurse=False):
                whole = DTensor.from_local(parameter.data, mesh, [Replicate()], run_check=False)
                submodule.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))

        def wrap(_module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            return tuple(DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs)

        def unwrap(_module: nn.Module, output: DTensor, _mesh: DeviceMesh) -> Tensor:
            return output.to_local()

        hooks = {"input_fn": wrap, "output_fn": unwrap} if self.local_activations else {}
        return distribute_module(module, device_mesh, replicate, **hooks)


class VocabParallelEmbedding(RowwiseParallel):
    """The embedding cut by rows: each rank looks up its own tokens, the sum over ranks is everyone's."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        # The reduction may still be in flight. A copy waits for it; a compiled block would drop its gradient.
        module.register_forward_hook(lambda _module, _inputs, output: output.clone())
        return module


class VocabParallelHead(ColwiseParallel):
    """The head cut by rows. Columns of -inf, which no softmax sees, make the logits of a short share as wide as the
    others', so that column i of rank r is token r * V + i. See [Note: short share]."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        width = share_of_vocabulary(self.vocab_size, device_mesh.size())
        missing = width - len(module.weight.to_local())
        if missing:
            module.register_forward_hook(lambda _module, _inputs, x: F.pad(x, (0, missing), value=float("-inf")))
        return module


class VocabParallelLoss(ParallelStyle):
    """Head and cross-entropy in one, where the head's rows lie on several ranks. Each has a share of the sum that is the
    gradient of the head's input."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def localize(_module: nn.Module, inputs: tuple[DTensor, DTensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            x_BTD, weight_VD, targets_BT = inputs
            return x_BTD.to_local(grad_placements=[Partial()]), weight_VD.to_local(), targets_BT

        module.holder = RanksOfVocabulary(device_mesh.get_group(), share_of_vocabulary(self.vocab_size, device_mesh.size()))
        module.register_forward_pre_hook(localize)
        return module


class SharedLoss(ParallelStyle):
    """An auxiliary loss of which each rank has a share. One that is a DTensor is dealt out in equal shares."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def share(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, loss, step = inputs
            if isinstance(loss, DTensor):
                alike = loss.redistribute(placements=[Replicate()])
                loss = alike.to_local(grad_placements=[Partial()]) / device_mesh.size()
            return x, loss, step

        module.register_forward_pre_hook(share)
        return module


class Held(ParallelStyle):
    """A `Vector` of which every rank holds its share of one dim; its arithmetic sees the share as a plain tensor."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def cut(_name: str, submodule: nn.Module, mesh: DeviceMesh) -> None:
            share = distribute_tensor(submodule.weight.data, mesh, [Shard(self.dim)], src_data_rank=None)
            submodule.register_parameter("weight", nn.Parameter(share, requires_grad=submodule.weight.requires_grad))

        return distribute_module(module, device_mesh, cut, output_fn=lambda _module, output, _mesh: output.to_local())


@dataclass(frozen=True)
class Rule:
    """What tensor parallelism does at one module: where its tensors lie, and the style that sees to it."""

    style: ParallelStyle
    weight: Placement | None
    """Where its parameters lie; None where it has none."""
    input: Placement
    produced: Placement
    """Where what the module itself computes lies."""
    output: Placement
    """Where what the next module gets lies."""
    read_in_parts: bool = False
    """Whether each rank's readers of the whole output use it for their part of the work, so that its gradient arrives as
    partial sums."""

    @property
    def forward(self) -> str:
        """Collective on its output in the forward pass, of one activation [B, T, D]; "" where there is none."""
        return collective(self.produced, self.output)

    @property
    def backward(self) -> str:
        """Collective on the gradient of its output in the backward pass."""
        arrives = Partial() if self.read_in_parts else gradient_of(self.output)
        return collective(arrives, gradient_of(self.produced))


def collective(have: Placement, want: Placement) -> str:
    """What turns one placement into another; "" where nothing is sent."""
    if isinstance(have, Partial):
        return "" if isinstance(want, Partial) else "reduce-scatter" if isinstance(want, Shard) else "all-reduce"
    return "all-gather" if isinstance(have, Shard) and isinstance(want, Replicate) else ""


def gradient_of(placement: Placement) -> Placement:
    """Where the gradient of a tensor lies: every summand of a sum has the sum's gradient."""
    return Replicate() if isinstance(placement, Partial) else placement


def seam(have: Placement, want: Placement, local: bool, read_in_parts: bool = False) -> Rule:
    """A module without parameters whose output changes its placement; `local` gives it as a plain tensor."""
    style = PrepareModuleOutput(output_layouts=have, desired_output_layouts=want, use_local_output=local)
    return Rule(style, None, have, have, want, read_in_parts)


def whole(local: bool = False) -> Rule:
    """Whole parameters and activations on every rank."""
    return Rule(Replicated(local_activations=local), Replicate(), Replicate(), Replicate(), Replicate())


def columns(style: ParallelStyle) -> Rule:
    """A projection cut by output rows (column-parallel)."""
    return Rule(style, Shard(0), Replicate(), Shard(-1), Shard(-1))


def rows() -> Rule:
    """A projection cut by input columns (row-parallel), whose partial sums a seam adds up later."""
    style = RowwiseParallel(output_layouts=Partial(), use_local_output=False)
    return Rule(style, Shard(1), Shard(-1), Partial(), Partial())


def embedding(output: Placement) -> Rule:
    """The embedding, cut by rows."""
    style = VocabParallelEmbedding(input_layouts=Replicate(), output_layouts=output)
    return Rule(style, Shard(0), Replicate(), Partial(), output)


def plan(model: Model, sequence_parallel: bool, async_tp: bool = False) -> dict[str, Rule]:
    """Module name -> rule, for the whole model. See [Note: tensor parallelism], and with `async_tp` [Note: one product]."""
    stream: Placement = Shard(1) if sequence_parallel else Replicate()
    adds_positions = model.pos_emb in ("learned", "sinusoidal")  # to whole rows, which are cut afterwards
    rules = {"embed_in": embedding(Replicate() if adds_positions else stream)}
    if model.pos_emb == "learned":
        rules["embed_pos"] = whole(local=True)
    if adds_positions:
        rules["embedded"] = seam(Replicate(), stream, local=True)
    for number, kinds in enumerate(kinds_of_layers(model)):
        block = {"normalize": seam(stream, Replicate(), local=False, read_in_parts=True)}
        for kind in kinds:
            block |= {kind.norm: whole()} | {f"{kind.module}.{name}": rule for name, rule in kind_rules(kind.cards(model))}
        block["join.total"] = seam(Partial(), stream, local=False)
        block["join"] = seam(stream, stream, local=True)
        if async_tp:
            assert sequence_parallel, "asynchronous tensor parallelism gathers and scatters the sequence"
            rules[f"layers.{number}"], block = in_one_product(model, kinds, block)
        rules |= {f"layers.{number}.{name}": rule for name, rule in block.items()}
    return rules | {
        "readout.normalize": seam(stream, Replicate(), local=False, read_in_parts=True),
        "readout.final_layer_norm": whole(),
        "readout.embed_out": columns(VocabParallelHead(model.padded_vocab_size)),
        "readout.cross_entropy": Rule(VocabParallelLoss(model.padded_vocab_size), None, Replicate(), Replicate(), Replicate()),
    }


def in_one_product(model: Model, kinds: tuple[Kind, ...], block: dict[str, Rule]) -> tuple[Rule, dict[str, Rule]]:
    """The rule of a block that computes projections together, and those left of its modules, given those of a plain block."""
    weights = {
        kind.module: {name.removesuffix(".weight"): card.cut for name, card in kind.cards(model).items() if card.role == "matrix"}
        for kind in kinds
        if kind.enclosed
    }
    for branch, cuts in weights.items():
        known = set(cuts.values()) <= {0, 1} and 1 in cuts.values()
        assert known, f"{branch} is enclosed: each of its matrices needs a cut, 0 or 1, and one is cut 1, but they are {cuts}"
    first = {branch: [name for name, cut in cuts.items() if cut == 0] for branch, cuts in weights.items()}
    last = {branch: next(name for name, cut in cuts.items() if cut == 1) for branch, cuts in weights.items()}
    laid = [f"{branch}.{name}" for branch, cuts in weights.items() for name in cuts]
    seams = ("normalize", "join.total", "join")
    left = {name: rule for name, rule in block.items() if name not in seams}
    left |= {name: replace(left[name], style=Laid(left[name].weight)) for name in laid}
    return Rule(OneProduct(first, last), None, Shard(1), Shard(1), Shard(1)), left


def kind_rules(cards: Cards) -> Iterator[tuple[str, Rule]]:
    """The rules of the modules of a kind, from the cards of their weights; a bias lies as its module's weight says. Any other
    parameter is whole on every rank, as a plain tensor, and its card may not say otherwise."""
    for name, card in cards.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and card.role == "matrix":
            yield module, whole() if card.cut is None else columns(ColwiseParallel()) if card.cut == 0 else rows()
        elif leaf == "weight" and card.cut is not None:
            yield module, Rule(Held(card.cut), Shard(card.cut), Shard(card.cut), Shard(card.cut), Shard(card.cut))
        else:
            assert leaf in ("weight", "bias") or card.cut is None, f"no module cuts {name}: hold it in a `Vector`"


def apply(model: Transformer, tp_mesh: DeviceMesh, sequence_parallel: bool, async_tp: bool = False) -> None:
    """Cut a model, or a part of one, over the tp axis. Works on meta tensors and communicates nothing."""
    here = dict(model.named_modules())
    styles = {name: rule.style for name, rule in plan(model.config, sequence_parallel, async_tp).items() if name in here}
    styles |= {name: SharedLoss() for name, module in here.items() if isinstance(module, AuxiliaryLoss)}
    # Without src_data_rank=None every weight would be broadcast from rank 0.
    parallelize_module(model, tp_mesh, styles, src_data_rank=None)
    model.tie()


def shard_tables(model: Transformer, tp_mesh: DeviceMesh) -> None:
    """Keep this rank's heads of the per-head position tables; after `model.build_tables`."""
    if model.slopes is not None:
        model.slopes = model.slopes.chunk(tp_mesh.size())[tp_mesh.get_local_rank()]
