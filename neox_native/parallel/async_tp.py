"""A block in which every tensor-parallel collective has one matrix product next to it, so that the two can run piece by piece.

[Note: one product] torch's asynchronous tensor parallelism (Inductor's pass `micro_pipeline_tp`; Wang et al. 2023, "Overlap
Communication with Dependent Computation via Decomposition in Large Deep Learning Models") cuts in pieces, one for each rank,
an all-gather whose result a product reads and a product whose result is reduce-scattered, and sends one piece while another is
multiplied. It finds them only where nothing lies between the two. So in a residual step, for the learned halves (A, b) of the
branches' norms, first projections (W, c) and last projections V, of which this rank has a share:

    x̂ whole -> one product with the rows of all W A -> + W b + c       instead of W (A x̂ + b) + c for each branch
    what the branches made, side by side -> one product with all V    instead of the sum of a V y for each branch

Their transposes are one product each, too, and so are matched in the backward pass: 2 pairs of collective and product for a
residual step and pass. Weights are scaled and copied, where plain tensor parallelism scales and adds whole activations: less
memory traffic from about 4 D / tp tokens in a microbatch on. They are made again in the backward pass, not kept. Parameters stay what
and where they are; the numbers are the same to rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._symmetric_memory import enable_symm_mem_for_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils.checkpoint import checkpoint

from neox_native.errors import UserError
from neox_native.mesh import Axis
from neox_native.model.block import Block
from neox_native.model.layers import Join, OutputLinear

OVERLAP = {"_micro_pipeline_tp": True}
"""Setting of Inductor with which it looks for the pairs, in groups that `share_memory` was called for."""
Products = dict[str, Tensor]
"""What the first projections of a branch give, by their names in the branch."""


class Unjoined(NamedTuple):
    """What a branch's last projection reads, [B, T, in], and its weight, [D, in]: this rank's share of both."""

    x: Tensor
    weight: Tensor


class Laid(ParallelStyle):
    """A projection whose parameters lie as its weight does, if they can be cut there; its block computes with them."""

    def __init__(self, weight: Shard):
        super().__init__()
        self.weight = weight

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def lay(_name: str, submodule: nn.Module, mesh: DeviceMesh) -> None:
            for name, parameter in submodule.named_parameters(recurse=False):
                placement: Placement = self.weight if self.weight.dim < parameter.ndim else Replicate()
                here = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
                submodule.register_parameter(name, nn.Parameter(here, requires_grad=parameter.requires_grad))

        return distribute_module(module, device_mesh, lay)


class OneProduct(ParallelStyle):
    """Lets a block that cuts the sequence compute the first projections of some of its branches together, and so the last ones.
    See [Note: one product].

    Its modules get other classes: nothing in them refers to the block, so that torch compiles once for all blocks alike.
    """

    def __init__(self, first: dict[str, list[str]], last: dict[str, str]):
        """From the name of a branch that is computed together with others to the names of its first projections and of
        its last one."""
        super().__init__()
        self.first, self.last = first, last

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _become(module, BlockOfOneProduct, mesh=device_mesh, first=self.first)
        _become(module.join, JoinOfOneProduct, mesh=device_mesh)
        for branch, names in self.first.items():
            for name in names:
                _become(module.get_submodule(f"{branch}.{name}"), FirstProjection, name=name)
            _become(module.get_submodule(f"{branch}.{self.last[branch]}"), LastProjection)
        return module


def _become(module: nn.Module, another: type[nn.Module], **attributes: object) -> None:
    """Let a module run as one of another class, with what it holds."""
    module.__class__ = another
    for name, value in attributes.items():
        setattr(module, name, value)


class FirstProjection(nn.Linear):
    """A projection that has run before it is called."""

    name: str

    def forward(self, products: Products) -> Tensor:
        """[B, T, rows of this rank]."""
        return products[self.name]


class LastProjection(OutputLinear):
    """A projection that is left to the join."""

    def forward(self, x: Tensor) -> Unjoined:
        """[B, T, columns of this rank] and the weight that is to meet it."""
        return Unjoined(x, self.weight.to_local())


class BlockOfOneProduct(Block):
    """A block whose branches in `first` find their first projections done. Others read DTensors, as in plain tensor parallelism.

    A single row [1, T, D] is treated as [T, D]: gathered along T it is a view, behind which torch's pass finds no product.
    """

    mesh: DeviceMesh
    first: dict[str, list[str]]

    def read(self, normalised_BTD: Tensor, step: list[tuple[str, str]]) -> list[Tensor | Products]:
        """In place of what each branch of a residual step reads, what its first projections make of it."""
        alone = len(normalised_BTD) == 1 and all(branch in self.first for _, branch in step)
        shard = normalised_BTD.flatten(0, 1) if alone else normalised_BTD
        cut = DTensor.from_local(shard, self.mesh, [Shard(shard.ndim - 2)], run_check=False)
        whole = cut.redistribute(placements=[Replicate()])
        reads = {branch: {} if branch in self.first else getattr(self, norm)(whole) for norm, branch in step}
        names = [(norm, branch, name) for norm, branch in step for name in self.first.get(branch, ())]
        if names:
            halves = [getattr(self, norm) for norm, _, _ in names]
            linears = [self.get_submodule(f"{branch}.{name}") for _, branch, name in names]
            weights = [linear.weight.to_local() for linear in linears]
            scales = [half.weight.to_local(grad_placements=[Partial()]) for half in halves]
            weight = checkpoint(_scaled, weights, scales, use_reentrant=False, preserve_rng_state=False)
            product = F.linear(whole.to_local(grad_placements=[Partial()]), weight)
            parts = product.view(len(normalised_BTD), -1, len(weight)).split([len(each) for each in weights], dim=-1)
            for (_, branch, name), part, each, half, linear in zip(names, parts, weights, halves, linears):
                shift = _shift(each, half.bias, linear.bias)
                reads[branch][name] = part if shift is None else part + shift
        return list(reads.values())


class JoinOfOneProduct(Join):
    """A join that computes the last projections that were left to it, as one."""

    mesh: DeviceMesh

    def forward(self, branches: list[Unjoined | DTensor], biases: list[DTensor | None]) -> Tensor:
        """Branches and biases [D] or None -> [B, T, D], this rank's part of the sequence."""
        left = [branch for branch in branches if isinstance(branch, Unjoined)]
        whole = [branch for branch in branches if not isinstance(branch, Unjoined)]
        if left:
            x, weight = left[0]
            if len(left) > 1:
                x = torch.cat([x for x, _ in left], dim=-1)
                weight = checkpoint(_beside, [weight for _, weight in left], use_reentrant=False, preserve_rng_state=False)
            x = x.flatten(0, 1) if len(x) == 1 and not whole else x
            whole.append(DTensor.from_local(F.linear(x, weight), self.mesh, [Partial()], run_check=False))
        total = sum(whole[1:], whole[0])
        joined = total.redistribute(placements=[Shard(total.ndim - 2)])
        for bias in biases:
            joined = joined if bias is None else joined + bias
        local = joined.to_local()
        return local.view(-1, *local.shape[-2:])


def _scaled(weights: list[Tensor], scales: list[Tensor]) -> Tensor:
    """Matrices [rows, D], each times its scale [D], one under the other."""
    return torch.cat([weight * scale for weight, scale in zip(weights, scales)])


def _beside(weights: list[Tensor]) -> Tensor:
    """Matrices [D, columns] side by side."""
    return torch.cat(weights, dim=-1)


def _shift(weight: Tensor, half: DTensor | None, bias: DTensor | None) -> Tensor | None:
    """W b + c: what a projection (W, c) makes of the shift b of a norm's learned half; None: 0."""
    parts = [weight @ half.to_local(grad_placements=[Partial()])] if half is not None else []
    parts += [bias.to_local()] if bias is not None else []
    return sum(parts[1:], parts[0]) if parts else None


def overlapping(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A backend for `torch.compile`: Inductor, which lets the pairs of the graph run piece by piece."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, config_patches=OVERLAP)


def share_memory(tensor: Axis, hosts: list[str]) -> None:
    """Let the GPUs of a tensor-parallel group read each other's memory, which torch's pass asks for.

    Args:
        hosts: the host of each rank of the job.

    Raises:
        UserError: they lie on several machines, or cannot.
    """
    ranks, here = dist.get_process_group_ranks(tensor.group), dist.get_rank()
    able = all(hosts[rank] == hosts[here] for rank in ranks) and all(
        # ranks of a machine are numbered as its GPUs are
        torch.cuda.can_device_access_peer(torch.cuda.current_device(), torch.cuda.current_device() + rank - here)
        for rank in ranks
        if rank != here
    )
    if not able:
        raise UserError(
            f"parallel.async_tp = true wants the parallel.tp = {tensor.size} GPUs of a group to read each other's memory, and "
            f"those of ranks {ranks} on {', '.join(sorted({hosts[rank] for rank in ranks}))} do not; lower parallel.tp, or set "
            "parallel.async_tp = false."
        )
    with warnings.catch_warnings():
        # torch calls this needless; yet its pass leaves a group alone for which it was not called (2.11 to 2.13).
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(tensor.group.group_name)
