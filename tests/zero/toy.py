"""A decoder small and uneven enough to test sharding with, its data, and the serial twin of a sharded run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from neox_native.config.schema import Parallel
from neox_native.fixed_point import FixedGradients
from neox_native.mesh import build_mesh
from neox_native.zero.layout import ZeroStage
from neox_native.zero.optimizer import ShardedOptimizer
from neox_native.zero.spec import ParameterSpec, Rule, Unit

VOCAB, WIDTH, FFN, BLOCKS, LENGTH = 13, 10, 22, 3, 5
"""None of the sizes is a multiple of 4, and a bias of 10 over 4 ranks leaves the last one a single element."""
GLOBAL_BATCH, STEPS = 8, 3


class Block(nn.Module):
    """Norm and MLP with a residual; `unused` never receives a gradient."""

    def __init__(self, unused: bool):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Toy(nn.Module):
    """Embedding, blocks, norm and head."""

    def __init__(self, tied: bool = False, unused: bool = False):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        if unused:
            self.embed.unused = nn.Parameter(torch.ones(3))
        self.blocks = nn.ModuleList(Block(unused and index == 1) for index in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Case:
    """What a run does."""

    stage: int = 0
    dtype: torch.dtype = torch.float32
    optimizer: str = "sgd"
    accumulation: int = 2
    tied: bool = False
    unused: bool = False
    frozen: tuple[str, ...] = ()
    recompute: bool = False
    compiled: bool = False
    fixed: bool = False
    """Gradients add up as integers."""
    clip: float = 0.5
    steps: int = STEPS
    scale: float = 1.0
    multipliers: tuple[tuple[str, float], ...] = ()
    """Parameters with a learning rate of their own, as a multiple of the run's."""
    own_groups: bool = False
    """On 4 ranks: block 1 is sharded over pairs of them, block 2 over nobody; their gradients are summed over the rest."""
    shard_size: int = 0
    """Neighbours among which all units are sharded; 0 takes all ranks."""
    skip_blocks: tuple[tuple[int, int], ...] = ()
    """(step, dp rank) pairs in which block 1 is left out: its parameters receive no gradient there."""


@dataclass
class Run:
    """What a run leaves behind, for comparison: per step losses, norms and (clipped) gradients; the final weights."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def make_optimizer(name: str) -> Callable[[list[dict]], torch.optim.Optimizer]:
    """Optimizers by name; "rmsprop" has no fused kernel."""
    if name == "sgd":
        return lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.05, fused=True)
    if name == "adamw":
        return lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return lambda groups: torch.optim.RMSprop(groups, lr=1e-3)


def learning_rate(case: Case) -> float:
    return 0.1 if case.optimizer == "sgd" else 1e-3


def build(case: Case) -> Toy:
    """The model of a case with its initial weights: the same on every rank."""
    torch.manual_seed(7)
    model = Toy(case.tied, case.unused)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in case.frozen)
    return model


def batch(step: int) -> Tensor:
    """Tokens of a step, [GLOBAL_BATCH, LENGTH + 1]."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, VOCAB, (GLOBAL_BATCH, LENGTH + 1), generator=generator)


def rule(name: str, case: Case) -> Rule:
    return Rule(not name.endswith("bias") and "norm" not in name, dict(case.multipliers).get(name, 1.0))


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Share of `rows` in the mean loss over the whole step."""
    logits = model(rows[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum") / (GLOBAL_BATCH * LENGTH)


def units_of(model: Toy, case: Case, dp: int) -> list[Unit]:
    """One unit per block, the embedding, the head with its norm; a tied embedding lives around the whole model."""
    named = {parameter: name for name, parameter in model.named_parameters()}
    mesh = build_mesh(Parallel(dp=dp, zero_shard_size=case.shard_size), torch.device("cpu"))
    sizes = {"block1": 2, "block2": 1} if case.own_groups and case.stage else {}

    def unit(name: str, modules: tuple[nn.Module, ...], readers: Sequence[nn.Module]) -> Unit:
        group, state_mesh, replicas = mesh.shards().group, mesh.state_mesh(), mesh.replicas() and mesh.replicas().group
        if name in sizes:
            state_mesh = init_device_mesh("cpu", (dp // sizes[name], sizes[name]), mesh_dim_names=("replicas", "shards"))
            replicas, group = state_mesh.get_all_groups()
        parameters = [parameter for module in readers for parameter in module.parameters() if parameter in named]
        names = [named[parameter] for parameter in parameters]
        specs = [
            ParameterSpec(name, parameter, rule(name, case))
            for name, parameter in zip(names, parameters)
        ]
        return Unit(name, modules, specs, group, state_mesh, replicas, not isinstance(modules[0], nn.Embedding))

    blocks = [unit(f"block{index}", (block,), (block,)) for index, block in enumerate(model.blocks)]
    embedding = unit("embedding", (model,) if case.tied else (model.embed,), (model.embed,))
    head = unit("head", (model.norm, model.head), (model.norm,) if case.tied else (model.norm, model.head))
    return [embedding, *blocks, head]


def prepare(model: Toy, case: Case) -> None:
    """Recompute and compile the blocks as a case asks, hooks staying outside."""
    for block in model.blocks:
        if case.recompute:
            forward = block.forward
            block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
        if case.compiled:
            block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")


def sharded(case: Case, dp: int) -> tuple[Toy, ShardedOptimizer]:
    """The model on the meta device, materialised by the optimizer."""
    initial = dict(build(case).named_parameters(remove_duplicate=False))
    with torch.device("meta"):
        model = build(case)
    prepare(model, case)
    optimizer = ShardedOptimizer(
        {0: units_of(model, case, dp)},
        ZeroStage(case.stage),
        make_optimizer(case.optimizer),
        case.dtype,
        torch.device("cpu"),
        FixedGradients(GLOBAL_BATCH, torch.device("cpu")) if case.fixed else None,
    )
    optimizer.materialize(lambda spec: initial[spec.name].detach())
    return model, optimizer


def backward(model: Toy, optimizer: ShardedOptimizer, case: Case, step: int, dp: int) -> float:
    """All microbatches of a step on this rank; returns this rank's share of the loss."""
    rank = dist.get_rank()
    rows = batch(step).chunk(dp)[rank]
    total = 0.0
    blocks = model.blocks
    if (step, rank) in case.skip_blocks:
        model.blocks = nn.ModuleList([blocks[0], blocks[2]])
    for index, micro in enumerate(rows.chunk(case.accumulation)):
        optimizer.microbatch(0, last=index == case.accumulation - 1)
        loss = loss_of(model, micro)
        (loss * case.scale).backward()
        total += loss.item()
    model.blocks = blocks
    return total


def run_sharded(case: Case, dp: int) -> Run:
    """Train on this rank; losses are summed over ranks, gradients and weights gathered."""
    model, optimizer = sharded(case, dp)
    result = Run()
    for step in range(case.steps):
        loss = torch.tensor(backward(model, optimizer, case, step, dp))
        dist.all_reduce(loss)
        scale = None if case.scale == 1.0 else torch.tensor(case.scale)
        norm, found_inf = optimizer.step(learning_rate(case), case.clip, scale)
        result.losses.append(loss.item())
        result.norms.append(norm.item())
        result.gradients.append(gather(optimizer, "gradient"))
        assert found_inf.item() == 0.0
    result.weights = gather(optimizer, "shard")
    return result


def gather(optimizer: ShardedOptimizer, what: str) -> dict[str, Tensor]:
    """Full tensors of the trainable parameters, from every rank's shards."""
    full = {}
    for trained in optimizer.trained:
        pieces: list = [None] * dist.get_world_size(trained.unit.group)
        dist.all_gather_object(pieces, getattr(trained, what), group=trained.unit.group)
        full[trained.spec.name] = torch.cat(pieces) if trained.unit.zero_stage else pieces[0].clone()
    return full


def run_serial(case: Case, dp: int) -> Run:
    """One process, plain torch: the twin of `run_sharded` in fp32."""
    model = build(case)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = []
    for name, parameter in named:
        rate = {"params": [parameter], "lr": learning_rate(case) * rule(name, case).lr_multiplier}
        groups.append(rate if rule(name, case).decay else rate | {"weight_decay": 0.0})
    optimizer = make_optimizer(case.optimizer)(groups)
    result = Run()
    for step in range(case.steps):
        for rank, rows in enumerate(batch(step).chunk(dp)):
            blocks = model.blocks
            if (step, rank) in case.skip_blocks:
                model.blocks = nn.ModuleList([blocks[0], blocks[2]])
            for micro in rows.chunk(case.accumulation):
                loss_of(model, micro).backward()
            model.blocks = blocks
        with torch.no_grad():
            result.losses.append(loss_of(model, batch(step)).item())
        for _, parameter in named:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norm = torch.nn.utils.clip_grad_norm_([parameter for _, parameter in named], case.clip or 1e9)
        result.norms.append(norm.item())
        result.gradients.append({name: parameter.grad.clone() for name, parameter in named})
        optimizer.step()
        optimizer.zero_grad()
    result.weights = {name: parameter.detach().clone() for name, parameter in named}
    return result
