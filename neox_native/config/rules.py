"""Rules about the model, the data and the optimisation. Each looks at a config and says in sentences what cannot work.

The rules assume that every number is in its range: `out_of_range` comes first, and `check.py` stops there if it speaks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from neox_native.config.schema import Config
from neox_native.config.settings import SETTINGS
from neox_native.config.values import to_toml

DATASET_KEYS = ("path", "weight", "labels")
"""What an entry of a mixture may tell."""
MAX_DATASETS = 255
"""A blend numbers its datasets in one byte."""


def out_of_range(config: Config) -> Iterator[str]:
    """Every number, alone or in a list, against its own limits."""
    for setting in SETTINGS.values():
        value = setting.of(config)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                if wanted := setting.range.broken_by(number):
                    yield f"{setting.dotted} = {to_toml(value)} must be {wanted}."


def divisors_around(number: int, wanted: int, times: int = 1) -> str:
    """The divisors of number next to wanted, below and above, times something, as "4 and 8"."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    near = [d for d in divisors if d < wanted][-1:] + [d for d in divisors if d > wanted][:1]
    return " and ".join(str(d * times) for d in near)


def heads(config: Config) -> Iterator[str]:
    """Heads divide the width, and key-value heads divide heads."""
    model = config.model
    if model.hidden_size % model.num_heads:
        yield (
            f"model.num_heads = {model.num_heads} does not divide model.hidden_size = {model.hidden_size}; "
            f"the nearest head counts that do are {divisors_around(model.hidden_size, model.num_heads)}."
        )
    if model.num_heads % model.kv_heads:
        yield (
            f"model.num_kv_heads = {model.kv_heads} does not divide model.num_heads = {model.num_heads}; "
            f"the nearest that do are {divisors_around(model.num_heads, model.kv_heads)}."
        )


def pattern(config: Config) -> Iterator[str]:
    """The pattern names kinds. Which ones there are is the model's to say."""
    entries = config.model.pattern
    if not entries or not all(name for entry in entries for name in entry.split("+")):
        yield f'model.pattern = {to_toml(entries)} must name layer kinds, such as ["attention+feed_forward"].'


def positions(config: Config) -> Iterator[str]:
    """Rotary embedding turns pairs of channels; a sinusoid has a sine and a cosine."""
    model = config.model
    rotary_dim = int(model.head_dim * model.rotary_pct)
    if model.hidden_size % model.num_heads:
        return  # `heads` speaks of it
    if model.pos_emb == "rotary" and (rotary_dim < 2 or rotary_dim % 2):
        even = max(2, rotary_dim - 1)
        share = f"{even / model.head_dim:.6g} turns {even}; " if even <= model.head_dim else ""
        yield (
            f"model.rotary_pct = {model.rotary_pct} of a head of {model.head_dim} channels turns {rotary_dim} of "
            f"them, but rotary embedding needs an even number above 0: {share}or choose another model.pos_emb."
        )
    if model.pos_emb == "sinusoidal" and model.hidden_size % 2:
        yield f'model.pos_emb = "sinusoidal" needs an even model.hidden_size, but it is {model.hidden_size}.'


def datasets(config: Config) -> Iterator[str]:
    """Training data is named, and mixtures are well formed."""
    for name in ("train", "valid"):
        value = getattr(config.data, name)
        if value or name == "train":
            yield from wrong_datasets(value, f"data.{name}")


def wrong_datasets(value: str | list[dict], setting: str) -> Iterator[str]:
    """One prefix, or entries that each have a path and a weight above 0, perhaps labels, and nothing else."""
    if not value:
        yield f'{setting} is empty: give the prefix of .idx/.bin files, or "builtin:python-stdlib".'
    entries = value if isinstance(value, list) else []
    if len(entries) > MAX_DATASETS:
        yield f"{setting} names {len(entries)} datasets, it takes 1 to {MAX_DATASETS}."
    for number, entry in enumerate(entries):
        shown = f"{setting}[{number}] = {to_toml(entry)}"
        unknown = sorted(set(entry) - set(DATASET_KEYS))
        paths = [entry.get("path"), entry.get("labels", "")]
        if unknown:
            yield f"{shown} has a key {unknown[0]!r}; its keys are {', '.join(DATASET_KEYS)}."
        elif not all(isinstance(path, str) for path in paths) or not paths[0] or not _is_positive(entry.get("weight")):
            yield (
                f"{shown} must have a path and a weight above 0, "
                'such as {path = "data/pile", weight = 1.0}; its labels, if it has any, are a path too.'
            )


def _is_positive(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf


def learning_rate(config: Config) -> Iterator[str]:
    """The schedule's parts fit into it."""
    lr, schedule = config.optimizer.lr, config.lr_schedule
    if schedule.min_lr > lr:
        yield f"lr_schedule.min_lr = {schedule.min_lr} is above the peak, optimizer.lr = {lr}; lower it, or raise the peak."
    both = schedule.warmup_fraction + schedule.cooldown_fraction
    if schedule.kind == "wsd" and both > 1:
        yield (
            f"lr_schedule.warmup_fraction({schedule.warmup_fraction}) + cooldown_fraction({schedule.cooldown_fraction}) "
            f"= {both:.6g} is more than the whole schedule; lower one so that they sum to 1 at most."
        )


def optimizer_shape(config: Config) -> Iterator[str]:
    """AdamW has two moments."""
    betas = config.optimizer.betas
    if len(betas) != 2:
        yield f"optimizer.betas = {to_toml(betas)} has {len(betas)} numbers, but AdamW takes 2, such as [0.9, 0.95]."


def loss_scale(config: Config) -> Iterator[str]:
    """The dynamic loss scale starts at or above its floor."""
    training = config.training
    if training.initial_loss_scale < training.min_loss_scale:
        yield (
            f"training.initial_loss_scale = {training.initial_loss_scale} is below training.min_loss_scale = "
            f"{training.min_loss_scale}; raise the first or lower the second."
        )


def recomputation(config: Config) -> Iterator[str]:
    """Some block recomputes. Where torch chooses what a compiled one makes again, it may choose random numbers, and draw
    others."""
    model, training = config.model, config.training
    if training.activation_checkpointing != "none" and training.recompute_every > model.num_layers:
        yield (
            f"training.recompute_every = {training.recompute_every} recomputes none of the model.num_layers = "
            f'{model.num_layers} blocks; lower it, or set training.activation_checkpointing = "none".'
        )
    if config.compile.on and training.activation_checkpointing == "selective" and model.drops:
        yield (
            'training.activation_checkpointing = "selective" with compile.enabled = true would draw other dropout masks in the '
            f"backward pass, where model.hidden_dropout = {model.hidden_dropout} and model.attention_dropout = "
            f'{model.attention_dropout}; set both to 0, compile.enabled = false, or take "full" or "none".'
        )


def saving(config: Config) -> Iterator[str]:
    """Saving has steps and a folder that it can use."""
    if not config.run.dir:
        yield 'run.dir is empty: name the run\'s folder, such as "runs/first".'
    steps = config.checkpoint.save_steps
    if isinstance(steps, str) and steps not in ("", "pythia"):
        yield f'checkpoint.save_steps = "{steps}" must be "pythia" or a list of steps, such as [0, 100, 1000].'
    if not config.checkpoint.resume:
        yield 'checkpoint.resume is empty: say "auto", "none" or the path of a checkpoint.'


def profiled(config: Config) -> Iterator[str]:
    """Steps to profile are some, and among the run's."""
    asked, steps = config.run.profile, config.training.steps
    if not asked:
        return
    named = config.run.profiled_steps if re.fullmatch("[0-9]{1,18}:[0-9]{1,18}", asked) else range(0)
    if not named or named[0] < 1:
        yield f'run.profile = "{asked}" must be FIRST:END, such as "10:13" for steps 10, 11 and 12, with 1 <= FIRST < END.'
    elif named[0] > steps:
        yield f'run.profile = "{asked}" begins after the last step, training.steps = {steps}; name earlier steps, or train longer.'


def repeatable(config: Config) -> Iterator[str]:
    """What cannot repeat bitwise is refused where bitwise was asked for."""
    mode = config.run.determinism
    if mode != "fast" and config.compile.on:
        yield (
            f'run.determinism = "{mode}" cannot hold with compile.enabled = true, which picks kernels by timing them, so '
            'that a restart may sum in another order; set compile.enabled = false or run.determinism = "fast".'
        )
