"""Config files and command lines -> Config, and back. The only reader of config files.

[Note: Where a setting comes from] The defaults of `schema.py`, then the file that `extends` names (and the files that
it extends), then the file itself, then the command line: each overrides single settings of those before.
Every value is checked where it is read, so that an error names the file that holds it.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from neox_native import shipped_folder
from neox_native.config.schema import Config
from neox_native.config.settings import SECTIONS, SETTINGS, Setting, help_text, nearest, settings_of
from neox_native.config.values import Mismatch, convert, describe, from_text, to_toml
from neox_native.errors import UserError

CONFIGS_FOLDER = shipped_folder("configs")
COMMAND_LINE = "the command line"
GPUS_OF_A_NODE = 8
"""Most machines for training have so many; only the example command in `dump` uses it."""
RETIRED = {
    "data.test": 'nothing read test data. Take it out, and the third share out of data.split ("969,30" for "969,30,1"), '
    "which keeps the training data as it was",
}
"""Settings of earlier versions, and what to do about them. A file may still say that one is empty."""
SETTINGS_FOLLOW = "Any setting may follow, as --parallel.tp 2; `python train.py --help` lists them."


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read the config file at path (None: the defaults alone) and apply overrides such as
    ["--parallel.tp", "2", "--optimizer.lr=3e-4"].

    Raises UserError for a file that cannot be read, an unknown setting or a value of the wrong type.
    """
    values = {} if path is None else _read(_found(Path(path)))
    values |= _overrides(overrides)
    sections = {
        section: section_class(**{s.name: values[s.dotted] for s in settings_of(section) if s.dotted in values})
        for section, section_class in SECTIONS.items()
    }
    return Config(**sections)


def from_command_line(arguments: Sequence[str], about: str | None = None) -> Config:
    """The Config that `train.py ARGUMENTS` asks for.

    `--help` exits after printing `about`, the docstring of a tool that takes the same arguments, or every setting.
    Raises UserError as `load` does, and where `--config` is missing or given twice.
    """
    paths, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if argument in ("--help", "-h"):
            sys.stdout.write(help_text() if about is None else f"{about}\n{SETTINGS_FOLLOW}\n")
            raise SystemExit(0)
        if argument == "--config":
            paths.append(next(remaining, ""))
        elif argument.startswith("--config="):
            paths.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    if len(paths) > 1:
        raise UserError(
            f"--config is given {len(paths)} times: {', '.join(paths)}; give one file, and let it start from the other "
            f'with extends = "{paths[0]}" at its top.'
        )
    path = "".join(paths)
    if not path:
        raise UserError(
            "No config file given: say --config FILE, for example --config configs/quickstart.toml; --help lists every setting."
        )
    return load(path, rest)


def dump(config: Config) -> str:
    """The whole config as TOML that loads back to an equal Config, under a comment that says how to repeat the run."""
    lines = [
        "# Every setting of this run. To repeat it in a new folder:",
        f"#   torchrun {_launch(config)} train.py --config THIS_FILE --run.dir NEW_FOLDER",
    ]
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        lines += [f"{s.dotted.removeprefix(section + '.')} = {to_toml(s.of(config))}" for s in settings_of(section)]
    return "\n".join(lines) + "\n"


def _launch(config: Config) -> str:
    """torchrun's options for the ranks of a config: one machine, or nodes of 8 GPUs where these divide the ranks."""
    parallel = config.parallel
    ranks = parallel.pp * parallel.dp * parallel.tp
    if parallel.dp == -1:
        return "--standalone --nproc-per-node RANKS"
    if ranks <= GPUS_OF_A_NODE:
        return f"--standalone --nproc-per-node {ranks}"
    if ranks % GPUS_OF_A_NODE:
        return "--nnodes NODES --nproc-per-node GPUS"
    return f"--nnodes {ranks // GPUS_OF_A_NODE} --nproc-per-node {GPUS_OF_A_NODE}"


def _found(path: Path) -> Path:
    """The file or, where it is missing, the shipped one of this name: configs/20b.toml is found from anywhere."""
    shipped = CONFIGS_FOLDER.parent / path
    return shipped if not path.exists() and path.parts[:1] == ("configs",) and shipped.is_file() else path


def _read(path: Path) -> dict[str, Any]:
    """Settings of the file and of those that it extends, directly or through others, by dotted name."""
    chain: dict[str, Path] = {}
    """Files from `path` on, as written, under their real names."""
    values: dict[str, Any] = {}
    base: Path | None = path
    while base is not None:
        if os.path.realpath(base) in chain:
            raise UserError(f"{' extends '.join(map(str, (*chain.values(), base)))}: a circle; take one `extends` out.")
        chain[os.path.realpath(base)] = base
        document = _document(base)
        extends = document.pop("extends", None)
        values = _checked(document, base) | values
        base = None if extends is None else _base(extends, base)
    return values


def _document(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read the config file {path}: {error.strerror}.") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise UserError(f"{path} is not valid TOML: {error}.") from error
    except RecursionError as error:
        raise UserError(f"{path} nests its lists or tables too deep; no setting needs that.") from error


def _base(extends: Any, path: Path) -> Path:
    """The file that `extends` in path means: beside path, or in the repository's configs/."""
    if not isinstance(extends, str):
        raise UserError(f'{path}: extends = {extends!r} must be one file name, such as "pythia/70m.toml".')
    places = [path.parent / extends, CONFIGS_FOLDER / extends]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(f'{path}: extends = "{extends}" names no file: neither {places[0]} nor {places[1]} exists.')
    return found


def _checked(document: dict[str, Any], path: Path) -> dict[str, Any]:
    values = {}
    for section, table in document.items():
        if section not in SECTIONS:
            raise _unknown_at_the_top(section, table, path)
        if not isinstance(table, dict):
            raise UserError(f"{path}: {section} = {table!r} must be a section: write [{section}], its settings below.")
        for key, value in table.items():
            if f"{section}.{key}" in RETIRED and value == "":
                continue
            setting = _setting(f"{section}.{key}", path)
            try:
                values[setting.dotted] = convert(value, setting.annotation)
            except Mismatch:
                raise _wrong_type(setting, to_toml(value), path) from None
    return values


def _unknown_at_the_top(name: str, value: Any, path: Path) -> UserError:
    """The error for a name outside of all sections that is no section itself."""
    if isinstance(value, dict):
        return UserError(f"{path}: there is no section [{name}]; the nearest is [{nearest(name, list(SECTIONS))}].")
    sections_of: dict[str, list[str]] = {}
    for dotted in SETTINGS:
        section, _, key = dotted.partition(".")
        sections_of.setdefault(key, []).append(f"[{section}]")
    near = name if name in sections_of else nearest(name, list(sections_of))
    return UserError(
        f"{path}: {name} = {to_toml(value)} stands outside of a section; write {near} below {' or '.join(sections_of[near])}."
    )


def _overrides(words: Sequence[str]) -> dict[str, Any]:
    """Settings of the command line. A value is the text after "=" or the next word; a true-or-false one needs none."""
    values: dict[str, Any] = {}
    position = 0
    while position < len(words):
        dotted, equals, text = words[position].removeprefix("--").partition("=")
        if not words[position].startswith("--"):
            raise UserError(
                f"{words[position]!r} on the command line is no setting: write --SECTION.NAME VALUE, such as --parallel.tp 2."
            )
        setting = _setting(dotted, COMMAND_LINE)
        position += 1
        if not equals:
            if position < len(words) and not words[position].startswith("--"):
                text = words[position]
                position += 1
            elif bool in (setting.annotation, *get_args(setting.annotation)):
                text = "true"
            else:
                raise UserError(f"--{dotted} needs a value: {describe(setting.annotation)}.")
        try:
            values[dotted] = from_text(text, setting.annotation)
        except Mismatch:
            raise _wrong_type(setting, text, COMMAND_LINE) from None
    return values


def _setting(dotted: str, source: Path | str) -> Setting:
    if dotted in RETIRED:
        raise UserError(f"{source}: {dotted} is no setting any more: {RETIRED[dotted]}.")
    if dotted not in SETTINGS:
        raise UserError(f"{source}: there is no setting {dotted}; the nearest is {nearest(dotted, list(SETTINGS))}.")
    return SETTINGS[dotted]


def _wrong_type(setting: Setting, value: str, source: Path | str) -> UserError:
    return UserError(
        f"{source}: {setting.dotted} = {value} must be {describe(setting.annotation)}, such as {to_toml(setting.default)}."
    )
