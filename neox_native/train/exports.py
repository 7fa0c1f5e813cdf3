"""Weights for others: a Hugging Face folder every so often, and the weights alone after the last step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from neox_native.checkpoint import files, store
from neox_native.checkpoint.saver import Saver
from neox_native.config.schema import Config
from neox_native.errors import UserError
from neox_native.interop.hugging_face import describe, export_state
from neox_native.launch import Ranks
from neox_native.train.fits import config_of

WEIGHTS = "weights"


class Exports:
    """What a run writes for others. `write` is a collective, and so is `due` with `missing_only`.

    Args:
        run: the run's folder.

    Raises:
        UserError: where Hugging Face's libraries could not read this model, before its first step.
    """

    def __init__(self, config: Config, run: Path, ranks: Ranks) -> None:
        self.config, self.run, self.ranks = config, run, ranks
        if config.checkpoint.export_hf_every:
            describe(config.model, torch.float32, config.data.tokenizer)

    def due(self, step: int, missing_only: bool) -> list[Path]:
        """Folders to write after `step`; with `missing_only`, those that are not there."""
        settings, last = self.config.checkpoint, self.config.training.steps
        every, found = settings.export_hf_every, []
        if every and step > 0 and (step % every == 0 or step == last):
            found.append(self.run / "hugging_face" / f"step_{step:09d}")
        if settings.export != "none" and step >= last:
            found.append(self.run / WEIGHTS)
        if not missing_only:
            return found
        return self.ranks.from_first([path for path in found if not self._is_written(path, step)])

    def _is_written(self, path: Path, step: int) -> bool:
        """Whether a folder holds the weights of this step, in the type that is asked for."""
        if path.name != WEIGHTS:
            return path.is_dir()  # its name tells the step, and it got it when it was complete
        try:
            metadata = files.read_metadata(path)
            return metadata.get("step") == step and config_of(metadata).checkpoint.export == self.config.checkpoint.export
        except (UserError, OSError):
            return False

    def write(self, path: Path, state: store.State, metadata: dict[str, Any], saver: Saver) -> str:
        """Write a folder that is due; returns what to say of it. `saver` ends a save that is under way first."""
        if path.name == WEIGHTS:
            saver.export(path, state, metadata)
            return f"wrote the weights alone to {path}"
        export_state(path, self.config.model, state, self.ranks, torch.float32, self.config.data.tokenizer)
        return f"wrote {path} for Hugging Face"
