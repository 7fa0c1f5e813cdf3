"""What a run keeps beyond its process, checkpoints and weights for others, and how it goes on from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from neox_native.checkpoint import store
from neox_native.checkpoint.resume import Start
from neox_native.checkpoint.saver import NotSaved, Saver
from neox_native.checkpoint.tokenizer_files import tokenizer_facts
from neox_native.config.schema import Config
from neox_native.data.build import Datasets
from neox_native.engine.spikes import SpikeGuard
from neox_native.launch import Ranks
from neox_native.optim.loss_scale import LossScale
from neox_native.reliability.bad_steps import BadSteps
from neox_native.reliability.watchdog import Watchdog
from neox_native.train import state as run_states
from neox_native.train.exports import Exports
from neox_native.train.report import Report
from neox_native.train.verdict import BAD_STEPS, go_on
from neox_native.zero.optimizer import ShardedOptimizer


class Keeper:
    """Saves and exports what changes while a run trains, and fills it again. Every method is a collective.

    Args:
        run: the run's folder.
        optimizer, loss_scale, spike_guard, bad_steps: what changes.
        data: its order and its tokenizer are told with each checkpoint.
        watchdog: learns that a save is no hang.
    """

    report: Report
    """Takes what is saved and exported; to be set once the run has begun."""

    def __init__(
        self,
        config: Config,
        run: Path,
        device: torch.device,
        optimizer: ShardedOptimizer,
        loss_scale: LossScale | None,
        spike_guard: SpikeGuard | None,
        bad_steps: BadSteps,
        data: Datasets,
        ranks: Ranks,
        watchdog: Watchdog,
    ):
        self.config, self.optimizer, self.ranks, self.watchdog = config, optimizer, ranks, watchdog
        self.loss_scale, self.spike_guard, self.bad_steps = loss_scale, spike_guard, bad_steps
        self.tokenizer, beside = tokenizer_facts(config.data.tokenizer, data.tokenizer)
        self.saver = Saver(run / "checkpoints", config.checkpoint, beside)
        self.exports = Exports(config, run, ranks, self.saver)
        self.fingerprint, self.runtime = data.train.fingerprint(), run_states.runtime_of(device, ranks)

    def resume(self, start: Start | None) -> tuple[int, int]:
        """Start from what was found: a checkpoint, another run's weights, or anew (None). Returns how many steps are done, and
        how many samples consumed."""
        if start is None:
            return 0, 0
        state = self.state()
        if start.weights_only:
            remarks = run_states.load_weights(start.path, state, self.config, self.ranks)
            self.optimizer.after_load()
            self.ranks.say(" ".join([f"starts from the weights of {start.path}", *(f"({remark})" for remark in remarks)]))
            return 0, 0
        saved = store.load(start.path, state, self.ranks, lenient=run_states.OPTIONAL, verified=True)
        sha256 = self.tokenizer.get("tokenizer_sha256", "")
        run_states.check_fits(saved, self.config, self.fingerprint, self.runtime, sha256)
        go_on(self.bad_steps, saved, self.config, self.saver.directory)
        self.optimizer.after_load()
        self.saver.pass_over(saved["step"])
        self.ranks.say(f"resumed {start.path} at step {saved['step']}")
        return saved["step"], saved["consumed_samples"]

    def state(self) -> store.State:
        """The tensors of a checkpoint; they alias what they show."""
        return run_states.run_state(self.optimizer, self.loss_scale, self.spike_guard)

    def metadata(self, step: int, consumed_samples: int) -> dict[str, Any]:
        """What a checkpoint of this step says about itself."""
        metadata = run_states.metadata(self.config, step, consumed_samples, self.fingerprint, self.runtime)
        return metadata | self.tokenizer | {BAD_STEPS: self.bad_steps.count}

    def save(self, step: int, consumed_samples: int) -> None:
        """Save what is known of this step. While updates are skipped, the checkpoints before them do not make way."""
        self.watchdog.at(step, "save")
        self.report.sync()
        self.saver.save(step, self.state(), self.metadata(step, consumed_samples), keep_all=self.bad_steps.count > 0)

    def finish_saves(self, step: int, consumed_samples: int) -> None:
        """Wait for a save in the background; one that failed is tried once more."""
        if self.saver.settle():
            self.save(step, consumed_samples)
            self.saver.wait()
        self.report_saves(step)

    def export_if_due(self, step: int, consumed_samples: int, missing_only: bool = False) -> None:
        """Write the weights for others where that is due after this step; with `missing_only`, what a killed run did not
        come to."""
        for folder in self.exports.due(step, missing_only):
            self.watchdog.at(step, "export")
            wrote = self.exports.write(folder, self.state(), self.metadata(step, consumed_samples))
            self.report.event("export", step, f"step {step}: {wrote}")

    def report_saves(self, step: int) -> None:
        """Write down the checkpoints that have been finished, and those that failed in the background."""
        for saved in self.saver.reports():
            if isinstance(saved, NotSaved):
                self.report.event("save failed", step, str(saved))
            else:
                self.report.event("checkpoint", saved.step, str(saved), stall_seconds=saved.stall_seconds)
