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
ROUNDING = ("training.micro_batch_size", "training.precision", "compile.enabled")
"""Settings that, like all of [parallel], cut sums or draw masks in another way and are not meant to change what is trained.
Recomputation is none of them: it repeats the same operations."""
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
    """Raise `UserError` where resuming from a checkpoint would not continue its run. In bitwise mode, raise it also where
    rounding or the elements that dropout drops would differ.

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
    if config.run.determinism == "bitwise" and (found := _rounded_otherwise(saved, config, runtime)):
        raise UserError(
            f'run.determinism = "bitwise", but the run was changed since the checkpoint of step {saved["step"]}: {", ".join(found)}; '
            'numbers would agree to rounding only. Go on as it was, or set run.determinism = "fast".'
        )


def _rounded_otherwise(saved: dict[str, Any], config: Config, runtime: dict[str, str]) -> list[str]:
    """How a checkpoint's layout, other `ROUNDING` settings and runtime differ from this run's, as far as it tells."""
    layout = {name: value for name, value in saved["layout"].items() if name in LAYOUT and isinstance(value, int)}
    trained = config_of(saved)
    # Earlier versions wrote settings that a mesh ignores as the user gave them.
    trained = replace(trained, parallel=in_use(replace(trained.parallel, **layout)))
    told = [
        setting
        for dotted, setting in SETTINGS.items()
        if setting.section == "parallel" or dotted in ROUNDING
        if "config" in saved or setting.name in layout
    ]
    changed = {setting.dotted: (setting.of(trained), setting.of(config)) for setting in told}
    changed |= {name: (saved.get(name, here), here) for name, here in runtime.items()}
    return [f"{name} was {was} and is now {now}" for name, (was, now) in changed.items() if was != now]
