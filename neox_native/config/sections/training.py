"""The optimisation: batches, precision, objective, update rule and learning rate. See `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from neox_native.config.ranges import BelowOne, Count, Positive, Share


@dataclass(frozen=True)
class Training:
    """The optimisation loop."""

    steps: Count = 1000
    """Optimizer updates of the whole run [steps]."""
    global_batch_size: Count = 32
    """Sequences per update over all ranks [sequences]."""
    micro_batch_size: Count = 4
    """Sequences per forward pass of one rank [sequences]."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of parameters and activations; bf16 and fp16 keep fp32 master weights and accumulate gradients in fp32. With
    run.determinism "fast", GPUs multiply fp32 matrices in TF32."""
    clip_grad_norm: float = 1.0
    """Largest global L2 norm of the gradient; 0 switches clipping off."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What a block recomputes in its backward pass: "selective" all that is cheap, "full" all but its input (4/3 of the FLOPs)."""
    activation_memory_budget: Share = 0.5
    """"selective" in compiled blocks: the share of what "none" keeps that they keep; torch chooses what they recompute [fraction]."""
    recompute_every: Count = 1
    """Only every so many-th block recomputes, the others keep all [blocks]."""
    loss_slice_tokens: Count = 512
    """Tokens of a microbatch that have logits at a time; longer slices cost memory, and a GPU fewer passes over fp32 sums [tokens]."""
    initial_loss_scale: Positive = 4096.0
    """fp16: first dynamic loss scale, of the mean loss of a microbatch."""
    loss_scale_window: Count = 1000
    """fp16: steps without overflow after which the loss scale doubles [steps]."""
    loss_scale_hysteresis: Count = 2
    """fp16: overflows since the loss scale last doubled from which on each one halves it [steps]."""
    min_loss_scale: Positive = 1.0
    """fp16: smallest loss scale."""
    max_bad_steps: int = 20
    """More steps in a row than this that are not finite, or spikes, end the run, its state saved; a restart with the same
    settings does not train on. 0: never [steps]. They are counted on logged steps and, where those are further apart, every
    max_bad_steps + 1 steps, which waits for the device once: such a row ends after 2 * max_bad_steps + 1 of them at the latest."""
    spike_threshold: float = 0.0
    """Skip the update of a loss this many standard deviations above the last ones; 0 skips none."""
    spike_window: Count = 128
    """Losses that `spike_threshold` looks back at [steps]."""

    def num_microbatches(self, dp: int) -> int:
        """Microbatches of a step on each of dp data-parallel ranks, whose number must divide the batch (`layout_rules.batch`)."""
        return self.global_batch_size // (self.micro_batch_size * dp)

    def forgets(self, layer: int) -> str:
        """What layer number `layer` of the whole model recomputes: "none", "selective" or "full"."""
        return "none" if (layer + 1) % self.recompute_every else self.activation_checkpointing


@dataclass(frozen=True)
class Optimizer:
    """The update rule. Biases and norms are never decayed."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Update rule."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: list[BelowOne] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay rates of the two moments."""
    eps: Positive = 1e-8
    """AdamW's term in the denominator."""
    weight_decay: float = 0.1
    """Weight decay: decoupled for AdamW (Loshchilov & Hutter 2019), added to the gradient for SGD."""
    momentum: BelowOne = 0.9
    """SGD's momentum."""


@dataclass(frozen=True)
class Objective:
    """What is minimised."""

    kind: str = "next_token"
    """How the model's value of each token becomes the loss: "next_token", the mean negative log-likelihood of the targets."""


@dataclass(frozen=True)
class LrSchedule:
    """Learning rate over the steps, update for update GPT-NeoX's: update k has the schedule's value after k - 1 updates, so
    that with warmup the first has rate zero; a step that overflows in fp16 does not count."""

    kind: Literal["cosine", "linear", "exponential", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """Shape after warmup."""
    warmup_fraction: Share = 0.01
    """Share of decay_steps in which the rate rises linearly from zero [fraction]."""
    decay_steps: int = 0
    """Steps over which the schedule's shape extends; 0 means training.steps [steps]."""
    min_lr: float = 0.0
    """Rate that cosine and wsd end at and that no schedule falls below after warmup."""
    cooldown_fraction: Share = 0.1
    """wsd: share of decay_steps in which the rate falls at the end [fraction]."""
