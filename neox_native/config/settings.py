"""The index of all settings: dotted name -> section, annotation, default and documentation, read off `schema.Config`."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import textwrap
from functools import cache
from typing import Any, get_type_hints

from neox_native.config import schema
from neox_native.config.ranges import Range, range_of
from neox_native.config.values import describe, to_toml


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of one section."""

    dotted: str
    """Name in TOML and on the command line: "parallel.tp"."""
    section: str
    """Attribute of Config."""
    name: str
    """Attribute of the section's dataclass; where it is a Python keyword it ends in an underscore."""
    annotation: Any
    """Type of its values."""
    range: Range
    """What its numbers may be."""
    default: Any
    """Value where nothing is said."""

    def of(self, config: schema.Config) -> Any:
        """This setting's value in config."""
        return getattr(getattr(config, self.section), self.name)


SECTIONS: dict[str, type] = get_type_hints(schema.Config)


def _index() -> dict[str, Setting]:
    defaults = schema.Config()
    found = [
        Setting(
            f"{section}.{name.removesuffix('_')}",
            section,
            name,
            annotation,
            range_of(ranges[name]),
            default=getattr(getattr(defaults, section), name),
        )
        for section, section_class in SECTIONS.items()
        for ranges in [get_type_hints(section_class, include_extras=True)]
        for name, annotation in get_type_hints(section_class).items()
    ]
    return {setting.dotted: setting for setting in found}


SETTINGS: dict[str, Setting] = _index()


def settings_of(section: str) -> list[Setting]:
    """The settings of one section."""
    return [setting for setting in SETTINGS.values() if setting.section == section]


def nearest(name: str, valid: list[str]) -> str:
    """The valid name that looks most like name."""
    return difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]


@cache
def _documentation(section_class: type) -> dict[str, str]:
    """Field -> the string under it in the section's source; "" -> the section's own docstring."""
    (node,) = ast.parse(inspect.getsource(section_class)).body
    found = {"": inspect.getdoc(section_class) or ""}
    for statement, below in zip(node.body, node.body[1:]):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def documentation(setting: Setting) -> str:
    """What the setting means, with its unit."""
    return _documentation(SECTIONS[setting.section]).get(setting.name, "")


def help_text() -> str:
    """Every setting with its values, default and documentation: what `train.py --help` prints."""
    lines = [
        "usage: torchrun --standalone --nproc-per-node RANKS train.py --config FILE [--dry-run] [--SECTION.NAME VALUE] ...",
        "",
        "--dry-run trains nothing: it says what each rank of the config's mesh would need and send.",
        'FILE is TOML with the sections below; `extends = "other.toml"` at its top starts from another file.',
        "The command line wins over FILE; --SECTION.NAME=VALUE is the same as --SECTION.NAME VALUE, and a bare",
        "--SECTION.NAME switches a true-or-false setting on.",
    ]
    for section, section_class in SECTIONS.items():
        lines += ["", f"[{section}]  {_documentation(section_class)['']}"]
        for setting in settings_of(section):
            values = describe(setting.annotation)
            if setting.range.words != Range().words:
                values += f", {setting.range.words}"
            lines.append(f"  --{setting.dotted}  {values}; default {to_toml(setting.default)}")
            lines += textwrap.wrap(documentation(setting), 116, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"
