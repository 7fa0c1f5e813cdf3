"""Running the microbatches of a step without a pipeline.

Shapes: M microbatches of a step, B sequences of a microbatch, T sequence.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from neox_native.model.transformer import Transformer
from neox_native.parallel.pipeline import GradientSink, LossFunction
from neox_native.parallel.timing import Timing


class Engine(Protocol):
    """Runs a step's microbatches; `parallel.pipeline.Pipeline` is the other one."""

    timing: Timing

    def forward_backward(
        self, inputs_MBT: Tensor, targets_MBT: Tensor, extras: dict[str, Tensor], loss_function: LossFunction
    ) -> Tensor:
        """Forward and backward; gradients go to the optimizer. Returns the sum of the losses, detached; zero on ranks
        without the last stage."""

    def forward(
        self, inputs_MBT: Tensor, targets_MBT: Tensor, extras: dict[str, Tensor], loss_function: LossFunction
    ) -> Tensor:
        """Forward only; returns the same."""


class SingleStage:
    """One microbatch after the other through the whole model."""

    def __init__(self, model: Transformer, sink: GradientSink, device: torch.device):
        self.model, self.sink = model, sink
        self.timing = Timing(device)

    def forward_backward(
        self, inputs_MBT: Tensor, targets_MBT: Tensor, extras: dict[str, Tensor], loss_function: LossFunction
    ) -> Tensor:
        """See `Engine`."""
        total = torch.zeros((), device=inputs_MBT.device)
        for index in range(len(inputs_MBT)):
            self.timing.on_microbatch(index)
            arguments = {name: tensor[index] for name, tensor in extras.items()}
            with self.timing.compute.running():
                loss = loss_function(self.model(inputs_MBT[index], **arguments), targets_MBT[index])
                self.sink.microbatch(0, last=index == len(inputs_MBT) - 1)
                loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def forward(
        self, inputs_MBT: Tensor, targets_MBT: Tensor, extras: dict[str, Tensor], loss_function: LossFunction
    ) -> Tensor:
        """See `Engine`."""
        total = torch.zeros((), device=inputs_MBT.device)
        for index in range(len(inputs_MBT)):
            self.timing.on_microbatch(index)
            arguments = {name: tensor[index] for name, tensor in extras.items()}
            total += loss_function(self.model(inputs_MBT[index], **arguments), targets_MBT[index])
        return total
