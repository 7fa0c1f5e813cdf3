"""What a run keeps beyond its process: checkpoints, and weights for others."""

from __future__ import annotations

from pathlib import Path

import torch

from neox_native.checkpoint import files
from neox_native.checkpoint.saver import NotSaved, Saver
from neox_native.config.schema import Config
from neox_native.errors import UserError
from neox_native.interop.hugging_face import describe, export_state
from neox_native.launch import Ranks
from neox_native.reliability.watchdog import Watchdog
from neox_native.train.fits import config_of
from neox_native.train.report import Report
from neox_native.train.state import RunState

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

    def write(self, path: Path, state: RunState, saver: Saver) -> str:
        """Write a folder that is due; returns what to say of it. `saver` ends a save that is under way first."""
        if path.name == WEIGHTS:
            saver.export(path, state.tensors(), state.metadata())
            return f"wrote the weights alone to {path}"
        export_state(path, self.config.model, state.tensors(), self.ranks, torch.float32, self.config.data.tokenizer)
        return f"wrote {path} for Hugging Face"


class Keeper:
    """Saves and exports the state of a run. Creating one is a collective, and so is every method.

    Args:
        report: takes what is saved and exported.
        watchdog: learns that a save is no hang.
    """

    def __init__(self, config: Config, state: RunState, exports: Exports, report: Report, watchdog: Watchdog) -> None:
        self.state, self.exports, self.report, self.watchdog = state, exports, report, watchdog
        self.saver = Saver(state.directory, config.checkpoint, state.tokenizer_files)
        self.saver.pass_over(state.step)

    def save(self) -> None:
        """Save the state. While updates are skipped, the checkpoints before them do not make way."""
        self.watchdog.at(self.state.step, "save")
        self.report.sync()
        keep_all = self.state.bad_steps.count > 0
        self.saver.save(self.state.step, self.state.tensors(), self.state.metadata(), keep_all)

    def finish_saves(self) -> None:
        """Wait for a save in the background; one that failed is tried once more."""
        if self.saver.settle():
            self.save()
            self.saver.wait()
        self.report_saves()

    def export_if_due(self, missing_only: bool = False) -> None:
        """Write the weights for others where that is due after this step; with `missing_only`, what a killed run did not
        come to."""
        step = self.state.step
        for folder in self.exports.due(step, missing_only):
            self.watchdog.at(step, "export")
            wrote = self.exports.write(folder, self.state, self.saver)
            self.report.event("export", step, f"step {step}: {wrote}")

    def report_saves(self) -> None:
        """Write down the checkpoints that have been finished, and those that failed in the background."""
        for saved in self.saver.reports():
            if isinstance(saved, NotSaved):
                self.report.event("save failed", self.state.step, str(saved))
            else:
                told = {"stall_seconds": saved.stall_seconds, "state_hash": saved.state_hash}
                self.report.event("checkpoint", saved.step, str(saved), **told)
