"""Dynamic loss scale for fp16 (Micikevicius et al. 2018 §3.2), without a word to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from neox_native.config.schema import Training


class LossScale:
    """Doubles after `loss_scale_window` steps without overflow; halves at an overflow once `loss_scale_hysteresis`
    overflows have been met since the last doubling, never below `min_loss_scale`. That is GPT-NeoX's rule.

    [Note: gradients in range] The loss of a step is a mean over all its tokens. Multiplied by 4096 in a step of 2M tokens,
    4 of 5 gradients of a trained model's 50k logits are below what fp16 can hold. So the scale acts on the mean over a
    microbatch's tokens, as in GPT-NeoX (1 of 35 then): a step's loss is multiplied by the scale and by the number of its
    microbatches on all ranks, and the fp32 sums of its gradients are divided by both.
    """

    def __init__(self, training: Training, device: torch.device):
        self.window, self.hysteresis = training.loss_scale_window, training.loss_scale_hysteresis
        self.minimum = training.min_loss_scale
        self.scale = torch.tensor(training.initial_loss_scale, dtype=torch.float32, device=device)
        """What to multiply a microbatch's mean loss by."""
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)
        """Steps since the last overflow or doubling."""
        self.patience = torch.tensor(self.hysteresis, dtype=torch.int64, device=device)
        """Overflows left, this one included, until the scale halves."""
        self.overflows = torch.zeros((), dtype=torch.int64, device=device)
        """Steps that have overflowed; the learning rate does not move on with them."""

    def of_step(self, num_microbatches: int) -> Tensor:
        """What to multiply a step's mean loss by, and to divide its gradients by. See [Note: gradients in range]."""
        return self.scale * num_microbatches

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Account for a step; `found_inf` is 1.0 if it overflowed, else 0.0, on the device and equal on all ranks."""
        overflow = found_inf > 0
        halve = overflow & (self.patience <= 1)
        self.overflows.add_(overflow)
        good_steps = torch.where(overflow, 0, self.good_steps + 1)
        double = ~overflow & (good_steps >= self.window)
        scale = torch.where(halve, (self.scale / 2).clamp(min=self.minimum), self.scale)
        self.scale.copy_(torch.where(double, scale * 2, scale))
        self.good_steps.copy_(torch.where(double, 0, good_steps))
        patience = torch.where(overflow & ~halve, self.patience - 1, self.patience)
        self.patience.copy_(torch.where(double, self.hysteresis, patience))

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors; filling them in place restores the state."""
        names = ("scale", "good_steps", "patience", "overflows")
        return {name: getattr(self, name) for name in names}
