"""Where the numbers of a run come from: the settings of each start that trained, and the code and machines of each.

    config.toml                     settings of the latest start
    config_step_000000100.toml      settings of an earlier one, which began at step 100; its successor changed something
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from neox_native.config.load import dump, load
from neox_native.config.schema import Config
from neox_native.config.settings import SETTINGS
from neox_native.config.values import to_toml
from neox_native.durable import write_whole
from neox_native.errors import UserError
from neox_native.plain_files import read_bytes
from neox_native.reliability.startup import code_hash
from neox_native.units import counted

SETTINGS_FILE = "config.toml"
EARLIER = "config_*.toml"
"""Names of the settings of earlier starts, as a pattern."""
HEADER = "# The start at step {}.\n"


def write_settings(run: Path, config: Config, step: int, aside: Path | None) -> list[str]:
    """Make the run's `config.toml` say `config`, the settings of the start at `step`. Other settings of the start before are
    kept under a name of their own; where nothing changed, nothing is written.

    Args:
        aside: where the earlier run has been moved to, for a start that turned away from it.

    Returns:
        a line for each setting that changed: "training.steps: 100 -> 200".
    """
    file, said = run / SETTINGS_FILE, (HEADER.format(step) + dump(config)).encode()
    if not os.path.lexists(file):
        write_whole(file, said)
        return []
    earlier = read_bytes(file)
    changed = _changes(file, config)
    if changed or aside:
        _keep(earlier, aside / SETTINGS_FILE if aside else run / _name(earlier))
        write_whole(file, said)
    return changed


def _changes(file: Path, config: Config) -> list[str]:
    """What `config` sets otherwise than a file does."""
    try:
        before = load(file)
    except UserError as error:
        return [f"{file.name} of the last start cannot be compared: {error}"]
    pairs = ((setting, to_toml(setting.of(before)), to_toml(setting.of(config))) for setting in SETTINGS.values())
    return [f"{setting.dotted}: {old} -> {new}" for setting, old, new in pairs if old != new]


def _name(settings: bytes) -> str:
    """The name under which settings are kept: it tells the step at which they began, which earlier versions did not note."""
    step = re.match(HEADER.format("([0-9]{1,18})").encode(), settings)
    return f"config_step_{int(step[1]):09d}.toml" if step else "config_earlier.toml"


def _keep(settings: bytes, file: Path) -> None:
    """Write settings to a file, or under the next free name. A start that a crash cut short has written them already."""
    name, number = file, 1
    while os.path.lexists(name):
        if name.is_file() and read_bytes(name) == settings:
            return
        number += 1
        name = file.with_name(f"{file.stem}_{number}{file.suffix}")
    write_whole(name, settings)


def origin(layout: str, hosts: list[str]) -> dict[str, Any]:
    """What a start runs with, and where.

    Args:
        layout: the mesh's, in words.
        hosts: name of each rank's.
    """
    names = list(dict.fromkeys(hosts))
    return {"code": code_hash(), "torch": str(torch.__version__), "world_size": len(hosts), "layout": layout, "hosts": names}


def in_words(origin: dict[str, Any]) -> str:
    """The same in a few words."""
    names = origin["hosts"]
    where = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    ranks = counted(origin["world_size"], "rank")
    return f"on {ranks} ({origin['layout']}) of {where}, code {origin['code']}, torch {origin['torch']}"
