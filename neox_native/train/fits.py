"""What a checkpoint says about itself, and whether it fits this run. No tensor is read for it."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from neox_native.config.check import incompatible
from neox_native.config.described import described_config
from neox_native.config.layout_rules import in_use
from neox_native.config.schema import Config
from neox_native.config.settings import SETTINGS
from neox_native.data.dataset import check_fingerprint
from neox_native.errors import UserError
from neox_native.launch import Ranks
from neox_native.metrics.throughput import device_name

LAYOUT = ("pp", "dp", "tp", "zero_stage")
"""Settings of [parallel] that a checkpoint tells beside its config, which the oldest ones do not have."""
ROUNDING = ("training.micro_batch_size", "training.loss_slice_tokens", "training.precision", "compile.enabled")
"""Settings that, like all of [parallel], cut sums or draw masks in another way and are not meant to change what is trained.
Recomputation is none of them: it repeats the same operations."""
WITHIN_A_MICROBATCH = ("parallel.tp", "parallel.sequence_parallel", "parallel.async_tp", *ROUNDING)
"""Those that cut sums of floating-point numbers even in elastic mode, whose sums over microbatches and ranks are exact."""
KINDS = {"step": int, "consumed_samples": int, "data": dict, "layout": dict}
"""What a run needs of a checkpoint's metadata to go on."""


def runtime_of(device: torch.device, ranks: Ranks) -> dict[str, str]:
    """What decides how numbers are rounded, besides the settings: torch, and the kinds of device of all ranks. A CPU's
    instructions and threads cut its sums."""
    name = device_name(device)
    if device.type == "cpu":
        name = f"cpu ({torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()})"
    return {"torch": str(torch.__version__), "device": " + ".join(sorted(set(ranks.gather(name))))}


def metadata(
    config: Config, step: int, consumed_samples: int, fingerprint: dict[str, Any], runtime: dict[str, str]
) -> dict[str, Any]:
    """What a checkpoint says about itself.

    Args:
        fingerprint: of the training data.
        runtime: `runtime_of` the ranks.
    """
    return {
        "step": step,
        "consumed_samples": consumed_samples,
        "data": fingerprint,
        "model": asdict(config.model),
        "config": asdict(config),
        "layout": {name: getattr(config.parallel, name) for name in LAYOUT},
        **runtime,
    }


def config_of(saved: dict[str, Any]) -> Config:
    """The settings that a checkpoint was trained with, as far as it tells; those that it does not know have their defaults.

    Raises `UserError` where it tells none.
    """
    told = saved.get("config", {"model": saved.get("model")})
    if not isinstance(told, dict) or not isinstance(told.get("model"), dict):
        raise UserError("The checkpoint's metadata.json does not describe its model; it is not a checkpoint of this program.")
    return described_config(told, "The checkpoint's metadata.json")


def check_fits(
    saved: dict[str, Any], config: Config, fingerprint: dict[str, Any], runtime: dict[str, str], tokenizer_sha256: str = ""
) -> None:
    """Raise `UserError` where resuming from a checkpoint would not continue its run. In bitwise and elastic mode, raise it also
    where rounding or the elements that dropout drops would differ.

    Args:
        saved: the checkpoint's metadata.
    """
    lacking = [name for name, kind in KINDS.items() if type(saved.get(name)) is not kind or (kind is int and saved[name] < 0)]
    if lacking:
        raise UserError(
            f"The checkpoint's metadata.json does not tell {', '.join(lacking)}, which a run needs to go on; take its weights "
            "alone with checkpoint.initialize_from."
        )
    trained = config_of(saved)
    if tokenizer_sha256 and saved.get("tokenizer_sha256") == tokenizer_sha256:  # the same one under another name
        trained = replace(trained, data=replace(trained.data, tokenizer=config.data.tokenizer))
    if found := incompatible(trained, config):
        raise UserError(" ".join(found))
    check_fingerprint(saved["data"], fingerprint, "training")
    if found := _rounded_otherwise(saved, config, runtime):
        mode, step, changes = config.run.determinism, saved["step"], ", ".join(found.values())
        free = mode == "bitwise" and all(name.startswith("parallel.") and name not in WITHIN_A_MICROBATCH for name in found)
        raise UserError(
            f'run.determinism = "{mode}", but the run was changed since the checkpoint of step {step}: {changes}; '
            'numbers would agree to rounding only. Go on as it was, or set run.determinism = "fast"'
            + ('; a run that begins with "elastic" may change this and keeps its numbers.' if free else ".")
        )


def _rounded_otherwise(saved: dict[str, Any], config: Config, runtime: dict[str, str]) -> dict[str, str]:
    """How a checkpoint's layout, other `ROUNDING` settings and runtime differ from this run's, as far as it tells and as the
    run's mode forbids: a sentence by name. A fast run may become elastic: from there on it repeats."""
    mode, trained = config.run.determinism, trained_as(saved)
    if mode == "fast" or mode == "elastic" and trained.run.determinism == "fast":
        return {}
    told = [
        setting
        for dotted, setting in SETTINGS.items()
        if (setting.section == "parallel" or dotted in ROUNDING if mode == "bitwise" else dotted in WITHIN_A_MICROBATCH)
        if "config" in saved or setting.name in saved["layout"]
    ]
    if "elastic" in (mode, trained.run.determinism):
        told.append(SETTINGS["run.determinism"])
    changed = {setting.dotted: (setting.of(trained), setting.of(config)) for setting in told}
    changed |= {name: (saved.get(name, here), here) for name, here in runtime.items()}
    return {name: f"{name} was {was} and is now {now}" for name, (was, now) in changed.items() if was != now}


def trained_as(saved: dict[str, Any]) -> Config:
    """The settings of a checkpoint, its layout as it was in use: earlier versions wrote settings that a mesh ignores as the
    user gave them."""
    layout = {name: value for name, value in saved["layout"].items() if name in LAYOUT and isinstance(value, int)}
    trained = config_of(saved)
    return replace(trained, parallel=in_use(replace(trained.parallel, **layout)))


def what_becomes_of_numbers(saved: dict[str, Any], config: Config) -> list[str]:
    """A sentence for each thing about a start from a checkpoint that bears on the numbers of an otherwise unchanged run."""
    trained, found = trained_as(saved), []
    was, now = trained.parallel.dp, config.parallel.dp
    same = {trained.run.determinism, config.run.determinism} == {"elastic"}
    if was > 0 and was != now:
        before, after = trained.training.num_microbatches(was), config.training.num_microbatches(now)
        found.append(
            f"dp was {was} and is now {now}: each rank computes {after} of a step's {after * now} microbatches instead of {before}; "
            + ("the numbers stay the same" if same else "the numbers agree to rounding")
        )
    if trained.run.determinism == "fast" and config.run.determinism == "elastic":
        found.append('the checkpoint is of a run with run.determinism = "fast": the same bits in every layout from here on')
    return found


def require_one_kind(config: Config, runtime: dict[str, str]) -> None:
    """Raise `UserError` where an elastic run's ranks round in several ways: which of them had a sample would show."""
    if config.run.determinism == "elastic" and " + " in runtime["device"]:
        raise UserError(
            f'run.determinism = "elastic" needs ranks of one kind, but they are {runtime["device"]}, which round differently: '
            'take machines of one kind, or set run.determinism = "fast".'
        )
