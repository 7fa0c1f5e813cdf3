"""Forward and backward of one step on any mesh, without an optimizer, and its serial twin."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from neox_native.config.schema import Compile, Model, Parallel, Training
from neox_native.mesh import build_mesh
from neox_native.model import initialize
from neox_native.model.transformer import Transformer, cards
from neox_native.parallel.assemble import assemble, local_slice
from neox_native.parallel.pipeline import Pipeline
from neox_native.parallel.tensor import shard_tables

MODEL = Model(num_layers=4, hidden_size=32, num_heads=4, seq_length=16, vocab_size=60, vocab_multiple_of=16)
CPU = torch.device("cpu")


class NoSink:
    """Leaves gradients where autograd puts them."""

    def microbatch(self, stage_index: int, last: bool) -> None:
        pass

    def absorb(self) -> None:
        pass


def batch(model: Model, microbatches: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [M, B, T]."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, model.vocab_size, (microbatches, size, model.seq_length + 1), generator=generator)
    return tokens[..., :-1], tokens[..., 1:]


def fill(part: Transformer) -> None:
    """Materialise a part of the model with values that make every parameter matter."""
    for module in part.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                module.register_parameter(name, torch.nn.Parameter(empty))
    part.tie()
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            full = draw(part.global_name(name), part.config)
            target = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            target.copy_(local_slice(full, parameter))
    part.build_tables(CPU)


def draw(name: str, model: Model) -> torch.Tensor:
    """Initial values, with biases and norms moved off zero and one."""
    full = initialize.draw(name, cards(replace(model, init_std=0.1))[name], seed=5)
    if full.ndim == 1:
        full = full + 0.1 * torch.randn(full.shape, generator=torch.Generator().manual_seed(initialize.seed_of(1, name)))
    return full


def of_microbatch(values: torch.Tensor, number: int) -> torch.Tensor:
    """A loss that depends on the microbatch's number, too."""
    return (1 + number) * values.sum()


def serial(model: Model, microbatches: int, size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one process."""
    with torch.device("meta"):
        whole = Transformer(model)
    fill(whole)
    inputs, targets = batch(model, microbatches, size)
    total = 0.0
    for number, (x, y) in enumerate(zip(inputs, targets)):
        loss = of_microbatch(whole(x, targets_BT=y), number) / targets.numel()
        loss.backward()
        total += loss.item()
    return total, {whole.global_name(name): parameter.grad for name, parameter in whole.named_parameters()}


def on_mesh(
    model: Model, parallel: Parallel, microbatches: int, size: int, compiled: bool = False, recompute: str = "none"
) -> tuple[float, dict[str, torch.Tensor], float]:
    """What one rank of a pp x tp mesh sees: the step's loss, its whole gradients, and the evaluation loss."""
    mesh = build_mesh(parallel, CPU)
    training = Training(activation_checkpointing=recompute, loss_slice_tokens=24)  # in one process: all
    parts = assemble(model, parallel, training, Compile(enabled=compiled), mesh)
    for part in parts.values():
        fill(part)
        if parallel.tp > 1:
            shard_tables(part, mesh.tensor.mesh)
    num_stages = parallel.pp * parallel.virtual_stages
    inputs, targets = batch(model, microbatches, size)

    def loss_function(values, microbatch):
        return of_microbatch(values, microbatch) / targets.numel()

    if parallel.pp == 1:
        (part,) = parts.values()
        losses = [loss_function(part(x, targets_BT=y), number) for number, (x, y) in enumerate(zip(inputs, targets))]
        evaluated = torch.stack(losses).sum().detach()
        for loss in losses:
            loss.backward()
        total = evaluated
    else:
        hidden_length = model.seq_length // (parallel.tp if parallel.sequence_parallel else 1)
        pipeline = Pipeline(
            parts, num_stages, parallel.pipeline_schedule, microbatches, (size, model.seq_length), hidden_length,
            torch.float32, CPU, mesh.pipeline.group, NoSink(),
        )  # fmt: skip
        fields = {"tokens_BT": inputs, "targets_BT": targets}
        evaluated = pipeline.forward(fields, loss_function).sum()
        total = pipeline.forward_backward(fields, loss_function, range(microbatches)).sum()
        for value in (evaluated, total):
            dist.all_reduce(value, group=mesh.pipeline.group)
    return total.item(), whole_gradients(parts), evaluated.item()


def whole_gradients(parts: dict[int, Transformer]) -> dict[str, torch.Tensor]:
    """Global name -> full gradient of every parameter on this rank."""
    gradients: dict[str, torch.Tensor] = {}
    for part in parts.values():
        for name, parameter in part.named_parameters():
            gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            name = part.global_name(name)
            gradients[name] = gradients[name] + gradient if name in gradients else gradient  # of both readers of a tied matrix
    return gradients
