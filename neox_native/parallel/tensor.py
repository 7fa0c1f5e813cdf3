"""Tensor parallelism as data: one dict from module name to what happens there.

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

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)

from neox_native.config.schema import Model
from neox_native.model.transformer import Transformer
from neox_native.parallel.cuts import share_of_vocabulary
from neox_native.parallel.loss import vocab_parallel_cross_entropy


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
    """The cross-entropy of logits whose columns lie on several ranks."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.forward = partial(vocab_parallel_cross_entropy, group=device_mesh.get_group())
        return module


@dataclass(frozen=True)
class Rule:
    """What tensor parallelism does at one module: the style that does it and, for people, what that means."""

    style: ParallelStyle
    weight: str = "-"
    """Placement of its parameters."""
    input: str = "-"
    """Placement of its input."""
    output: str = "-"
    """Placement of its output."""
    forward: str = "-"
    """Collective on its output in the forward pass, of one activation [B, T, D]."""
    backward: str = "-"
    """Collective in the backward pass."""


def plan(model: Model, sequence_parallel: bool) -> dict[str, Rule]:
    """Module name (`*` for every layer) -> rule, for the whole model. See [Note: tensor parallelism]."""
    stream: Placement = Shard(1) if sequence_parallel else Replicate()
    name = "Shard(1)" if sequence_parallel else "Replicate"
    reduce = "reduce-scatter" if sequence_parallel else "all-reduce"
    gather = "all-gather" if sequence_parallel else "-"

    def whole_from_stream() -> Rule:
        style = PrepareModuleOutput(output_layouts=stream, desired_output_layouts=Replicate(), use_local_output=False)
        return Rule(style, "-", name, "Replicate", gather, reduce)

    def stay_partial() -> Rule:
        return Rule(RowwiseParallel(output_layouts=Partial(), use_local_output=False), "Shard(1)", "Shard(-1)", "Partial")

    def gathered_norm() -> Rule:
        return Rule(Replicated(), "Replicate", "Replicate", "Replicate")

    def columns() -> Rule:
        return Rule(ColwiseParallel(), "Shard(0)", "Replicate", "Shard(-1)")

    reduced = PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=stream, use_local_output=False)
    unwrapped = PrepareModuleOutput(output_layouts=stream, desired_output_layouts=stream)
    embedding = VocabParallelEmbedding(input_layouts=Replicate(), output_layouts=stream)
    rules = {
        "embed_in": Rule(embedding, "Shard(0)", "Replicate", name, reduce, gather),
        "layers.*.normalize": whole_from_stream(),
        "layers.*.input_layernorm": gathered_norm(),
        "layers.*.attention.query_key_value": columns(),
        "layers.*.attention.dense": stay_partial(),
        "layers.*.post_attention_layernorm": gathered_norm(),
        "layers.*.mlp.dense_h_to_4h": columns(),
        "layers.*.mlp.dense_4h_to_h": stay_partial(),
        "layers.*.join.total": Rule(reduced, "-", "Partial", name, reduce, gather),
        "layers.*.join": Rule(unwrapped, "-", name, name),
        "readout.normalize": whole_from_stream(),
        "readout.final_layer_norm": gathered_norm(),
        "readout.embed_out": Rule(VocabParallelHead(model.padded_vocab_size), "Shard(0)", "Replicate", "Shard(-1)"),
        "readout.cross_entropy": Rule(VocabParallelLoss(), "-", "Shard(-1)", "Replicate"),
    }
    if model.gated:
        rules["layers.*.mlp.gate_h_to_4h"] = columns()
    if model.pos_emb in ("learned", "sinusoidal"):  # added to whole rows, which are cut afterwards
        embedding = VocabParallelEmbedding(input_layouts=Replicate(), output_layouts=Replicate())
        cut = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=stream)
        rules["embed_in"] = Rule(embedding, "Shard(0)", "Replicate", "Replicate", "all-reduce", "-")
        rules["embedded"] = Rule(cut, "-", "Replicate", name, "-", gather)
    if model.pos_emb == "learned":
        rules["embed_pos"] = Rule(Replicated(local_activations=True), "Replicate", "Replicate", "Replicate")
    return rules


def has_partial_gradient(name: str, sequence_parallel: bool) -> bool:
    """Whether a replicated parameter's gradient is only this tp rank's share of a sum.

    Norms read the whole x̂ but learn from this rank's heads and channels; with sequence parallelism the biases after
    a reduction see this rank's tokens only. Forgetting the reduction trains silently wrong.
    """
    after_reduction = name.endswith(("attention.dense.bias", "mlp.dense_4h_to_h.bias"))
    return "layernorm" in name or "layer_norm" in name or (after_reduction and sequence_parallel)


def apply(model: Transformer, tp_mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Cut a model, or a part of one, over the tp axis. Works on meta tensors and communicates nothing."""
    here = {name for name, _ in model.named_children() if getattr(model, name) is not None}
    rules = plan(model.config, sequence_parallel)
    styles = {name: rule.style for name, rule in rules.items() if name.split(".")[0] in here}
    if not len(model.layers):
        styles = {name: style for name, style in styles.items() if not name.startswith("layers.")}
    # Without src_data_rank=None every weight would be broadcast from rank 0.
    parallelize_module(model, tp_mesh, styles, src_data_rank=None)
    model.tie()


def shard_tables(model: Transformer, tp_mesh: DeviceMesh) -> None:
    """Keep this rank's heads of the per-head position tables; after `model.build_tables`."""
    if model.slopes is not None:
        model.slopes = model.slopes.chunk(tp_mesh.size())[tp_mesh.get_local_rank()]
