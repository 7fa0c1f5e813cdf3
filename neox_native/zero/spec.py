"""What the caller says about its parameters: which belong together and how each one is treated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate


@dataclass(frozen=True)
class Rule:
    """How the optimizer treats a parameter. Parameters of one rule are one group of the torch optimizer."""

    decay: bool = True
    """Whether weight decay applies."""
    lr_multiplier: float = 1.0
    """Its learning rate over the step's."""

    def settings(self) -> dict[str, Any]:
        """The settings of its group, which has no parameters yet. The optimizer's own hold for those that are missing."""
        return {"params": [], "lr_multiplier": self.lr_multiplier} | ({} if self.decay else {"weight_decay": 0.0})


@dataclass(frozen=True)
class SharedRows:
    """A tp-local shard that is no even cut: after rows of its own come rows of which other tp ranks hold copies, such as a
    key-value head that serves the queries of several ranks."""

    own: range
    """The rows of the whole parameter that this rank has alone."""
    copied: range
    """Those of which it has a copy; their gradient is a sum over `group`."""
    num_rows: int
    """Rows of the whole parameter."""
    group: dist.ProcessGroup
    counted: bool
    """Whether this rank counts the copied rows in the global norm."""


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter."""

    name: str
    """Global name: the key of its state in a checkpoint."""
    parameter: nn.Parameter
    """Plain, or a DTensor over the tp axis; on the meta device until it is materialised. It may be frozen."""
    rule: Rule = Rule()
    sum_over: tuple[dist.ProcessGroup, ...] = ()
    """Groups over which the gradient must be summed besides the unit's: tp, where each rank sees a part of it; the first
    and the last stage, where both use the embedding matrix."""
    counted: bool = True
    """Whether this rank counts the gradient in the global norm: one of those who hold the same shard does."""
    shared: SharedRows | None = None
    """For a parameter whose parts over tp overlap."""
    aliases: tuple[nn.Parameter, ...] = ()
    """Other parameters with the same content, whose gradients are added to this one's: a tied head, whose gradient comes from
    another rank in some layouts, and is therefore a summand of its own in all of them."""

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """It and its aliases."""
        return self.parameter, *self.aliases

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole parameter."""
        shape = self.parameter.shape
        return shape if self.shared is None else torch.Size((self.shared.num_rows, *shape[1:]))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the tp-local shard."""
        return tuple(local(self.parameter).shape)

    @property
    def placement(self) -> Placement:
        """Placement over the tp axis."""
        return self.parameter.placements[0] if isinstance(self.parameter, DTensor) else Replicate()


@dataclass(frozen=True)
class Unit:
    """What is sharded together. See [Note: rows and units]."""

    name: str
    modules: tuple[nn.Module, ...]
    """The modules that read the parameters, in the order in which they run. A parameter that is read elsewhere too
    (the embedding that is also the head) needs the module around all its readers."""
    specs: list[ParameterSpec]
    group: dist.ProcessGroup
    """The ranks over which the unit is sharded and its gradients are summed."""
    state_mesh: DeviceMesh
    """("tp", those ranks): a parameter is cut by tp, then each slice over the group. Checkpoints need it. A dim between the two
    holds replicas."""
    replicas: dist.ProcessGroup | None = None
    """The ranks that hold the same shards, and over which gradients are summed besides."""
    differentiates_values: bool = True
    """Whether backward passes through the modules read the parameters. Those through embedding tables do not."""


def local(tensor: Tensor) -> Tensor:
    """The tensor that this rank holds of a DTensor; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():  # otherwise to_local() records a graph node
        return tensor.to_local()


def local_gradient(spec: ParameterSpec, gradient: Tensor) -> Tensor:
    """This rank's part of a gradient that autograd has left, cut like the parameter; partial if `sum_over` says so."""
    if isinstance(gradient, DTensor):
        mesh = gradient.device_mesh
        deferred = any(group.group_name == mesh.get_group().group_name for group in spec.sum_over)
        if deferred:
            if not isinstance(gradient.placements[0], Partial):
                # torch 2.11 sums it itself in split backward passes; in equal shares it survives being summed again.
                return local(gradient) / mesh.size()
        elif gradient.placements[0] != spec.placement:
            # A vocabulary-parallel embedding's gradient arrives whole, a sequence-parallel norm's partial.
            gradient = gradient.redistribute(placements=[spec.placement])
    return local(gradient)


def give_storage(parameter: nn.Parameter, value: Tensor) -> None:
    """Replace a parameter's content, from the meta device too, keeping the object that modules and specs refer to."""
    replacement: Tensor = value
    if isinstance(parameter, DTensor):
        replacement = DTensor.from_local(
            value,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    torch.utils.swap_tensors(parameter, nn.Parameter(replacement, requires_grad=parameter.requires_grad))
