"""Running the microbatches of a step without a pipeline.

Shapes: M microbatches of a step, B sequences of a microbatch, T sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from neox_native.model.transformer import Transformer
from neox_native.parallel.pipeline import Fields, GradientSink, LossFunction
from neox_native.parallel.timing import Timing


class Engine(Protocol):
    """Runs a step's microbatches; `parallel.pipeline.Pipeline` is the other one."""

    parts: Mapping[int, Transformer]
    """This rank's stages by number."""
    timing: Timing

    def forward_backward(self, fields: Fields, loss_function: LossFunction, dropout_seeds: Sequence[int]) -> Tensor:
        """Forward and backward; gradients go to the optimizer. Returns the loss of each microbatch [M], detached; none [0] on
        ranks without the last stage. `dropout_seeds`: one for each microbatch, see `engine.dropout`."""

    def forward(self, fields: Fields, loss_function: LossFunction) -> Tensor:
        """Forward only; returns the same."""


class SingleStage:
    """One microbatch after the other through the whole model."""

    def __init__(self, model: Transformer, sink: GradientSink, device: torch.device):
        self.parts, self.sink = {0: model}, sink
        self.timing = Timing(device)

    def forward_backward(self, fields: Fields, loss_function: LossFunction, dropout_seeds: Sequence[int]) -> Tensor:
        """See `Engine`."""
        losses = []
        for index, arguments in self._microbatches(fields):
            with self.timing.compute.running():
                tokens_BT = arguments.pop("tokens_BT")
                loss = loss_function(self.parts[0](tokens_BT, **arguments, dropout_seed=dropout_seeds[index]), index)
                self.sink.microbatch(0, last=index == len(fields["tokens_BT"]) - 1)
                loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    @torch.no_grad()
    def forward(self, fields: Fields, loss_function: LossFunction) -> Tensor:
        """See `Engine`."""
        losses = [
            loss_function(self.parts[0](arguments.pop("tokens_BT"), **arguments), index)
            for index, arguments in self._microbatches(fields)
        ]
        return torch.stack(losses)

    def _microbatches(self, fields: Fields) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for index in range(len(fields["tokens_BT"])):
            self.timing.on_microbatch(index)
            yield index, {name: tensor[index] for name, tensor in fields.items()}
