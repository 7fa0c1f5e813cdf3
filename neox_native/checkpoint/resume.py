"""Where a run starts: at its newest whole checkpoint, at one named, at the weights of another run, or anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neox_native import tool_command
from neox_native.checkpoint import files, store
from neox_native.config.schema import Checkpoint
from neox_native.durable import put_back, sweep
from neox_native.errors import UserError
from neox_native.launch import Ranks

HUGGING_FACE = "config.json"
"""What tells a Hugging Face folder."""


@dataclass(frozen=True)
class Start:
    """A verified checkpoint to start from."""

    path: Path
    weights_only: bool
    """Fine-tuning: take the weights and begin at step 0 with a fresh optimizer."""


def find_start(config: Checkpoint, directory: Path, ranks: Ranks) -> Start | None:
    """What to start from, or None for a new run; every file of it has been checked. A collective over all ranks.

    `checkpoint.resume` = "auto" takes the newest whole checkpoint in `directory` and names those it skips; a path is taken or
    refused. Where there is nothing to resume, `checkpoint.initialize_from` gives the weights: a fine-tuning run that is
    restarted goes on with its own checkpoints.

    Raises:
        UserError: a named checkpoint, or each one in `directory`, is damaged. A new start would overwrite what may be mended.
    """
    with ranks.together(f"Opening {directory}"):
        if ranks.is_first:
            put_back(directory, "step_*")
    if config.resume == "auto":
        newest = _newest(directory, ranks, 'move them away, or start anew with checkpoint.resume = "none"')
        if newest is not None:
            return Start(newest, weights_only=False)
    elif config.resume != "none":
        return Start(_named("checkpoint.resume", config.resume, ranks), weights_only=False)
    if config.initialize_from:
        return Start(_weights(config.initialize_from, ranks), weights_only=True)
    return None


def _weights(path: str, ranks: Ranks) -> Path:
    """The checkpoint that `checkpoint.initialize_from` names, or the newest whole one of the run that it names."""
    folder = Path(path)
    with ranks.together(f'checkpoint.initialize_from = "{path}"'):
        if (folder / HUGGING_FACE).is_file() and not (folder / files.MANIFEST).is_file():
            raise UserError(
                "this is a Hugging Face folder; make a checkpoint of it, and name that: "
                f"{tool_command('convert')} from-hf {path} CHECKPOINT."
            )
    for directory in folder / "checkpoints", folder:
        if newest := _newest(directory, ranks, "or name another in checkpoint.initialize_from"):
            return newest
    return _named("checkpoint.initialize_from", path, ranks)


def _newest(directory: Path, ranks: Ranks, way_out: str) -> Path | None:
    """The newest whole checkpoint in a folder, None where it has none. Raises `UserError` where all are damaged."""
    newest = store.newest(directory, ranks)
    if newest is None and (damaged := store.saved_in(directory, ranks)):
        raise UserError(f"None of the {len(damaged)} checkpoints in {directory} is whole; mend one, {way_out}.")
    return newest


def _named(setting: str, path: str, ranks: Ranks) -> Path:
    """The checkpoint that a setting names, or a `UserError` that says what is wrong with it."""
    folder = Path(path)
    with ranks.together(f'{setting} = "{path}"'):
        if not folder.is_dir():
            raise UserError("there is no such folder; give the path of a checkpoint, such as runs/a/checkpoints/step_000001000.")
        inside = files.finished(folder) or files.finished(folder / "checkpoints")
        if inside:
            raise UserError(f"this folder holds checkpoints and is none; the newest is {inside[0]}.")
    complaints = store.find_damage(folder, ranks)
    if complaints:
        raise UserError(f'{setting} = "{path}" cannot be used: ' + "; ".join(complaints[: store.NAMES_SHOWN]) + ".")
    return Path(path)


def tidy(run: Path) -> None:
    """Remove from a run's folder what killed saves, exports, deletions and logs left behind."""
    own = "weights", "config.toml", "config_*.toml", ".begun", "metrics.jsonl", "events.jsonl"
    places = [(run, name) for name in own] + [(run / "checkpoints", "step_*"), (run / "hugging_face", "step_*")]
    for folder, names in places:
        put_back(folder, names)
        sweep(folder, names)
