"""The loop around the steps: train, log, evaluate, save, and leave in good order."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from itertools import chain, islice

import torch
from torch import Tensor

from neox_native.checkpoint.files import step_folder
from neox_native.checkpoint.resume import Start
from neox_native.checkpoint.retention import should_save
from neox_native.config.schema import Config
from neox_native.data.build import Datasets
from neox_native.data.loader import StepBatch, build_loader
from neox_native.durable import make_folder
from neox_native.engine.build import build_engine, build_step
from neox_native.engine.step import StepResult
from neox_native.errors import UserError
from neox_native.launch import Ranks
from neox_native.mesh import Mesh
from neox_native.model.transformer import Transformer
from neox_native.optim.schedule import Rates
from neox_native.reliability.bad_steps import BadSteps, EmptySteps
from neox_native.reliability.preemption import LeaveRequest, Requests
from neox_native.reliability.replicas import check_replicas
from neox_native.reliability.watchdog import FLIGHT_RECORDER, Watchdog
from neox_native.train import provenance, state as run_states
from neox_native.train.evaluate import evaluate, evaluation_number, in_words
from neox_native.train.folder import RunFolder
from neox_native.train.keeping import Keeper
from neox_native.train.report import Report
from neox_native.train.verdict import verdict
from neox_native.zero.optimizer import ShardedOptimizer


class Trainer:
    """A run from its first or its resumed step to its last.

    Args:
        config: checked and resolved.
        parts: this rank's parts of the model, as `build_model` made them.
        optimizer: the owner of their parameters.
        data: what to read.
        ranks: for agreement over saving and loading.
        folder: of the run.
        start: the checkpoint to start from.
        watchdog: has watched since the ranks met.
        requests: to leave.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        device: torch.device,
        parts: dict[int, Transformer],
        optimizer: ShardedOptimizer,
        data: Datasets,
        ranks: Ranks,
        folder: RunFolder,
        start: Start | None,
        watchdog: Watchdog,
        requests: Requests,
    ):
        self.config, self.mesh, self.device, self.data, self.ranks = config, mesh, device, data, ranks
        self.parts, self.optimizer, self.folder, self.start = parts, optimizer, folder, start
        self.watchdog, self.requests = watchdog, requests
        training = config.training
        self.engine = build_engine(config, mesh, device, parts, optimizer)
        self.train_step = build_step(config, mesh, device, self.engine, optimizer)
        self.losses, self.loss_scale = self.train_step.losses, self.train_step.loss_scale
        self.bad_steps, self.empty_steps = BadSteps(training), EmptySteps(mesh.rows.group, device)
        scales = self.train_step.loss_scale, self.train_step.spike_guard
        self.keeper = Keeper(config, folder.path, device, optimizer, *scales, self.bad_steps, data, ranks, watchdog)
        self.leave = LeaveRequest(requests)
        self.step, self.consumed_samples = 0, 0
        self.phase = "start"

    def run(self) -> None:
        """Train until `training.steps`, or until a request to leave."""
        self.watchdog.at(0, "resume")
        self.step, self.consumed_samples = self.keeper.resume(self.start)
        if self.has_nothing_to_do():
            return
        batches = self.steps_left()
        changed = self.folder.begin(self.config, self.step)
        if self.device.type == "cuda":
            make_folder(self.folder.path / FLIGHT_RECORDER)  # for NCCL, on each machine
        self.report = self.keeper.report = Report(
            self.config, self.mesh, self.device, self.ranks, self.losses, self.engine.timing, resumed_step=self.step
        )
        self.report_start(changed)
        self.engine.timing.on_microbatch = lambda index: self.watchdog.at(self.step + 1, self.phase, index)
        try:
            self.train(batches)
        finally:
            self.watchdog.at(self.step, "save")
            self.keeper.saver.close()
            self.requests.end_within()
            self.report.close()

    def has_nothing_to_do(self) -> bool:
        """Whether the run is complete, exports included: then this start changes nothing."""
        total_steps = self.config.training.steps
        if self.step < total_steps or self.keeper.exports.due(self.step, missing_only=True):
            return False
        if not self.folder.needs_nothing(self.config, self.step):
            return False
        self.ranks.say(f"nothing to do: step {self.step} of training.steps = {total_steps}; raise it to go on")
        return True

    def steps_left(self) -> Iterator[StepBatch]:
        """The run's batches from here on. The first is read now: data that cannot be read is refused before anything is
        written."""
        with self.ranks.together("Reading the first batch"):
            batches = self.batches("train", self.consumed_samples, self.config.training.steps - self.step)
            first = list(islice(batches, 1))
        return chain(first, batches)

    def report_start(self, changed: list[str]) -> None:
        """Write down with what, where and from what this start goes on, and what it changes."""
        hosts = self.ranks.gather(socket.gethostname())
        resumed, where = self.start is not None and not self.start.weights_only, provenance.origin(self.config.parallel, hosts)
        kind, path = "resumed" if resumed else "started", str(self.start.path) if self.start else None
        for line in ["changed since the last start:", *(f"  {line}" for line in changed)] if changed else []:
            print(line)
        message = f"step {self.step}: {kind} {provenance.in_words(where)}"
        self.report.event(kind, self.step, message, checkpoint=path, changed=changed, **where)

    def train(self, batches: Iterator[StepBatch]) -> None:
        """The steps; whatever is due after one happens in this order: log, evaluate, save, export, leave."""
        settings, total_steps = self.config, self.config.training.steps
        self.phase = "train"
        if self.step == 0 and should_save(0, settings.checkpoint, total_steps):
            self.save()
        self.keeper.export_if_due(self.step, self.consumed_samples, missing_only=True)
        overflows = self.loss_scale.overflows if self.loss_scale else None
        rates = Rates(settings.lr_schedule, settings.optimizer.lr, total_steps, overflows)
        for batch in batches:
            rate = rates(self.step + 1)
            self.watchdog.at(self.step + 1, self.phase)
            run_states.seed_dropout(settings, self.mesh, self.step + 1)
            result = self.train_step(batch, rate)
            self.step, self.consumed_samples = self.step + 1, batch.consumed_samples
            self.report.step_done()
            self.log_if_due(batch, result, rate)
            with self.report.throughput.paused():
                self.evaluate_if_due()
                signal = self.leave.after_step(self.keeper.saver.failed)
                self.save_if_due(signal)
                if signal or self.step == total_steps:
                    self.keeper.finish_saves(self.step, self.consumed_samples)
                self.keeper.export_if_due(self.step, self.consumed_samples)
                self.keeper.report_saves(self.step)
            if signal:
                self.report.event("signal", self.step, f"step {self.step}: leaving after {signal}; the state is saved")
                return
        if self.step == total_steps and self.keeper.saver.last_step == total_steps:
            self.report.finished(step_folder(self.keeper.saver.directory, total_steps))

    def batches(self, part: str, consumed_samples: int, steps: int) -> Iterator[StepBatch]:
        """This data rank's batches of "train" or "valid" from a sample on."""
        training = self.config.training
        return build_loader(
            self.data.train if part == "train" else self.data.valid,
            consumed_samples=consumed_samples,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            dp_rank=self.mesh.rows.rank,
            dp_size=self.mesh.rows.size,
            stop_after_steps=steps,
            pin_memory=self.device.type == "cuda",
        )

    def log_if_due(self, batch: StepBatch, result: StepResult, rate: float | Tensor) -> None:
        """Write the step down where it is due, and what was noticed since the last time."""
        logging, size = self.config.logging, self.config.training.global_batch_size
        self.bad_steps.record(self.step, tuple(range(batch.consumed_samples - size, batch.consumed_samples)), result.skipped)
        self.empty_steps.record(self.step, batch.num_targets)
        if due := self.step == self.config.training.steps or self.step % logging.every == 0:
            extra = {"loss scale": self.loss_scale.scale.item()} if self.loss_scale else {}
            self.watchdog.measured(self.report.step(self.step, batch, result, rate, extra))
        if due or self.bad_steps.may_have_passed_limit():
            self.look_at_bad_steps()
        if logging.stragglers_every and self.ranks.size > 1 and self.step % logging.stragglers_every == 0:
            self.report.stragglers(self.step)
        if (every := self.config.run.check_replicas_every) and self.step % every == 0:
            self.check_replicas()

    def check_replicas(self) -> None:
        """End the run where ranks differ in what they should hold alike: a restart goes on before that."""
        copies = run_states.copies(self.config, self.mesh, self.optimizer)
        if found := check_replicas(copies, self.ranks):
            raise UserError(f"step {self.step}: {found}; the run goes on from its last checkpoint, whose replicas agreed.")

    def look_at_bad_steps(self) -> None:
        """Name the steps without a target and the updates that were skipped since the last call, with their samples; too many
        skipped in a row end the run, its state saved."""
        for step in self.empty_steps.collect():
            message = f"step {step}: none of its tokens is to be predicted; momentum and weight decay alone moved the weights"
            self.report.event("empty step", step, message)
        for bad in self.bad_steps.collect():
            self.report.event("bad step", bad.step, str(bad), sample_ids=list(bad.sample_ids))
        if found := verdict(self.bad_steps, self.keeper.saver.directory, self.step):
            self.keeper.save(self.step, self.consumed_samples)
            self.keeper.finish_saves(self.step, self.consumed_samples)
            raise found

    def while_listening(self, batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """The batches of an evaluation. A request to leave that comes meanwhile is answered by a save: the launcher may not
        wait for the end."""
        for batch in batches:
            yield batch
            if self.leave.after_step(self.keeper.saver.failed):
                self.save()

    def evaluate_if_due(self) -> None:
        """Loss on the validation data, into the log."""
        settings, last = self.config.evaluation, self.step == self.config.training.steps
        if not settings.every or not (last or self.step % settings.every == 0):
            return
        self.phase = "evaluate"
        size = settings.batches * self.config.training.global_batch_size
        first = evaluation_number(self.step, settings.every) * size if settings.rotate else 0
        batches = self.while_listening(self.batches("valid", first, settings.batches))
        share, num_targets = evaluate(self.engine, self.parts.values(), self.losses, batches)
        loss = self.losses.total(share).item() if num_targets else None
        found = f"no validation loss: none of the tokens in its {settings.batches} batches is to be predicted"
        if loss is not None:
            found = f"validation loss {in_words(loss, self.config.data.tokenizer)} over {settings.batches} batches"
        self.report.event("evaluation", self.step, f"step {self.step}: {found}", loss=loss)
        self.phase = "train"

    def save_if_due(self, signal: str | None) -> None:
        """Save where the [checkpoint] section says so, before leaving, and where a rank has seen a save in the background fail."""
        failed = self.leave.failed and self.keeper.saver.settle()
        if signal or failed or should_save(self.step, self.config.checkpoint, self.config.training.steps):
            self.save()

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self.keeper.saver.last_step != self.step:
            self.look_at_bad_steps()
            if (every := self.config.run.check_replicas_every) and self.step % every:  # else they have just been checked
                self.check_replicas()
            self.keeper.save(self.step, self.consumed_samples)
