"""Losses that leap: their updates are skipped."""

from __future__ import annotations

import torch

from neox_native.config.schema import Training


class SpikeGuard:
    """Finds losses far above those of the last steps (the z-score rule of OLMo's skip-step optimizer, OLMo 2 2024).

    The window lies on the device and nothing waits for it. Losses that are bad do not enter the window, so that a
    plateau of spikes stays a plateau of spikes; nor do those of exactly 0, which steps without a target have. A window that
    is not full yet calls nothing a spike.

    Args:
        training: the [training] section; a loss more than `spike_threshold` standard deviations above the mean of the
            last `spike_window` losses is a spike.
        device: where the losses are.
    """

    def __init__(self, training: Training, device: torch.device) -> None:
        self.window, self.threshold = training.spike_window, training.spike_threshold
        # The window's losses, then how many have been accepted: one tensor, one entry of a checkpoint.
        self.state = torch.zeros(self.window + 1, dtype=torch.float64, device=device)

    def is_spike(self, loss: torch.Tensor) -> torch.Tensor:
        """Whether `loss` (scalar, equal on all ranks) is a spike, as a bool scalar; then takes it into the window
        unless it is one, not finite, or 0.
        """
        losses, count = self.state[:-1], self.state[-1:]
        value = loss.detach().reshape(1).to(losses)
        mean, deviation = losses.mean(), losses.std(correction=0)
        full = count >= self.window
        spike = full & (value - mean > self.threshold * deviation.clamp_min(1e-12))
        accepted = torch.isfinite(value) & (value != 0) & ~spike
        place = (count % self.window).to(torch.int64)
        losses.scatter_(0, place, torch.where(accepted, value, losses.gather(0, place)))
        count.add_(accepted.to(count.dtype))
        return spike.reshape(())
