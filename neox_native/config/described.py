"""Settings from a checkpoint or another program's config, checked as those of a run are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neox_native.config import rules
from neox_native.config.schema import Config, Model
from neox_native.config.settings import SECTIONS, SETTINGS, settings_of
from neox_native.config.values import Mismatch, convert, describe
from neox_native.errors import UserError


def described_model(values: Mapping[str, Any], file: str | Path) -> Model:
    """The [model] section of these values, named as in `schema.py`; those that are not told have their defaults.

    Raises:
        UserError: naming `file` and what is unknown, of another type, out of range or contradicts itself.
    """
    unknown = sorted(str(name) for name in values if f"model.{name}" not in SETTINGS)
    if unknown:
        raise UserError(f"{file} describes its model with {', '.join(unknown)[:200]}, which this version does not know.")
    model = Model(**_converted("model", values, file))
    config = Config(model=model)
    # The other sections have their defaults, which are in their ranges.
    faults = [*rules.out_of_range(config)] or [*rules.heads(config), *rules.pattern(config), *rules.positions(config)]
    if faults:
        raise UserError(f"{file} describes a model that cannot be: {' '.join(faults)}")
    return model


def described_config(sections: Mapping[str, Any], file: str | Path) -> Config:
    """All sections, as far as they are told; settings that this version does not know are left out. Raises `UserError` as
    `described_model` does, but looks at the ranges of the model's settings alone: they decide what is built."""
    for section in SECTIONS:
        if not isinstance(sections.get(section, {}), dict):
            raise UserError(f"{file}: its section {section} is no table of settings.")
    known = {name: _converted(name, sections.get(name, {}), file) for name in SECTIONS}
    described_model(known["model"], file)
    return Config(**{name: kind(**known[name]) for name, kind in SECTIONS.items()})


def _converted(section: str, values: Mapping[str, Any], file: str | Path) -> dict[str, Any]:
    """The values of a section's settings, each of its type; others are left out."""
    found = {}
    for setting in settings_of(section):
        if setting.name in values:
            try:
                found[setting.name] = convert(values[setting.name], setting.annotation)
            except Mismatch:
                said = f"{setting.dotted} = {values[setting.name]!r:.60} must be {describe(setting.annotation)}"
                raise UserError(f"{file}: {said}.") from None
    return found
