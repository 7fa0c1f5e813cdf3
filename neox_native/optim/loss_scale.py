"""Dynamic loss scale for fp16 (Micikevicius et al. 2018 §3.2), without a word to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from neox_native.config.schema import Training


class LossScale:
    """Doubles after `loss_scale_window` steps without overflow; halves at an overflow once `loss_scale_hysteresis`
    overflows have been met since the last doubling, never below `min_loss_scale`. That is GPT-NeoX's rule."""

    def __init__(self, training: Training, device: torch.device):
        self.window, self.hysteresis = training.loss_scale_window, training.loss_scale_hysteresis
        self.minimum = training.min_loss_scale
        self.scale = torch.tensor(training.initial_loss_scale, dtype=torch.float32, device=device)
        """What to multiply the loss by; pass it on to the optimizer's step."""
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)
        """Steps since the last overflow or doubling."""
        self.patience = torch.tensor(self.hysteresis, dtype=torch.int64, device=device)
        """Overflows left, this one included, until the scale halves."""

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Account for a step; `found_inf` is 1.0 if it overflowed, else 0.0, on the device and equal on all ranks."""
        overflow = found_inf > 0
        halve = overflow & (self.patience <= 1)
        good_steps = torch.where(overflow, 0, self.good_steps + 1)
        double = ~overflow & (good_steps >= self.window)
        scale = torch.where(halve, (self.scale / 2).clamp(min=self.minimum), self.scale)
        self.scale.copy_(torch.where(double, scale * 2, scale))
        self.good_steps.copy_(torch.where(double, 0, good_steps))
        patience = torch.where(overflow & ~halve, self.patience - 1, self.patience)
        self.patience.copy_(torch.where(double, self.hysteresis, patience))

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors; filling them in place restores the state."""
        return {"scale": self.scale, "good_steps": self.good_steps, "patience": self.patience}
