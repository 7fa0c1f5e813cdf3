"""What a run keeps beyond its process: checkpoints, and weights for others."""

from __future__ import annotations

from neox_native.checkpoint.saver import NotSaved, Saver
from neox_native.config.schema import Checkpoint
from neox_native.reliability.watchdog import Watchdog
from neox_native.train.exports import Exports
from neox_native.train.report import Report
from neox_native.train.state import RunState


class Keeper:
    """Saves and exports the state of a run. Creating one is a collective, and so is every method.

    Args:
        config: the [checkpoint] section.
        report: takes what is saved and exported.
        watchdog: learns that a save is no hang.
    """

    def __init__(self, config: Checkpoint, state: RunState, exports: Exports, report: Report, watchdog: Watchdog) -> None:
        self.state, self.exports, self.report, self.watchdog = state, exports, report, watchdog
        self.saver = Saver(state.directory, config, state.tokenizer_files)
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
            wrote = self.exports.write(folder, self.state.tensors(), self.state.metadata(), self.saver)
            self.report.event("export", step, f"step {step}: {wrote}")

    def report_saves(self) -> None:
        """Write down the checkpoints that have been finished, and those that failed in the background."""
        for saved in self.saver.reports():
            if isinstance(saved, NotSaved):
                self.report.event("save failed", self.state.step, str(saved))
            else:
                self.report.event("checkpoint", saved.step, str(saved), stall_seconds=saved.stall_seconds)
