"""The loop around the steps: train, log, evaluate, save, and leave in good order."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from neox_native.checkpoint.files import step_folder
from neox_native.checkpoint.retention import should_save
from neox_native.config.schema import Config
from neox_native.data.build import Datasets
from neox_native.data.loader import StepBatch
from neox_native.engine.step import StepResult, TrainStep
from neox_native.errors import UserError
from neox_native.launch import Launch, Ranks
from neox_native.mesh import Mesh
from neox_native.metrics.profile import Profile
from neox_native.optim.schedule import Rates
from neox_native.reliability.bad_steps import EmptySteps
from neox_native.reliability.preemption import LeaveRequest, Requests
from neox_native.reliability.replicas import check_replicas
from neox_native.reliability.watchdog import EXIT_STATUS, Watchdog
from neox_native.train.evaluate import evaluate, in_words
from neox_native.train.keeping import Keeper
from neox_native.train.report import Report
from neox_native.train.start import batches_of
from neox_native.train.state import RunState, copies
from neox_native.units import counted


class Trainer:
    """A run from where its state stands to its last step. Creating one is a collective, and so is every method.

    Args:
        config: checked and resolved.
        train_step: takes the model through a step.
        data: what an evaluation reads.
        state: what changes.
        report: takes what is to be known of the run.
        keeper: saves and exports the state.
        watchdog: has watched since the ranks met.
        requests: to leave.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        ranks: Ranks,
        train_step: TrainStep,
        data: Datasets,
        state: RunState,
        report: Report,
        keeper: Keeper,
        watchdog: Watchdog,
        requests: Requests,
    ) -> None:
        self.config, self.mesh, self.ranks, self.data = config, mesh, ranks, data
        self.train_step, self.state = train_step, state
        self.report, self.keeper, self.watchdog, self.requests = report, keeper, watchdog, requests
        self.empty_steps = EmptySteps(mesh.rows.group, train_step.losses.device)
        self.leave = LeaveRequest(requests)
        self.profile = Profile(config.run, ranks.rank, train_step.losses.device)
        self.last_step, self.starts_again = config.training.steps, False
        train_step.engine.timing.on_microbatch = watchdog.microbatch

    def run(self, batches: Iterator[StepBatch]) -> None:
        """Train on the steps' batches until the last step, or until a request to leave."""
        try:
            self.train(batches)
        finally:
            self.watchdog.end()
            self.keeper.saver.close()
            self.requests.end_within()
            self.report.close()
        if self.starts_again:
            raise SystemExit(EXIT_STATUS)

    def train(self, batches: Iterator[StepBatch]) -> None:
        """The steps, and what is due after each."""
        state, settings = self.state, self.config
        if state.step == 0 and should_save(0, settings.checkpoint, self.last_step):
            self.save()
        self.keeper.export_if_due(missing_only=True)
        overflows = state.loss_scale.overflows if state.loss_scale else None
        rates = Rates(settings.lr_schedule, settings.optimizer.lr, self.last_step, overflows)
        for batch in batches:
            rate = rates(state.step + 1)
            self.watchdog.at(state.step + 1, "train")
            self.profile.begin(state.step + 1)
            result = self.train_step(batch, rate)
            state.step, state.consumed_samples = state.step + 1, batch.consumed_samples
            self.look_back(batch, result, rate)
            with self.report.throughput.paused():
                signal = self.keep()
            if signal:
                return self.say_goodbye(signal)
        if state.step == self.last_step and self.keeper.saver.last_step == self.last_step:
            self.report.finished(step_folder(state.directory, self.last_step))

    def say_goodbye(self, signal: str) -> None:
        """Write down what ended the run, and who starts again."""
        launch = Launch.from_environment()
        nodes = self.leave.goes_on(launch, self.ranks)
        self.starts_again = launch.node in nodes
        more = f"; {counted(len(nodes), 'node')} not asked to leave: starting again" if nodes else ""
        self.report.event("signal", self.state.step, f"step {self.state.step}: leaving after {signal}; the state is saved{more}")

    def look_back(self, batch: StepBatch, result: StepResult, rate: float | Tensor) -> None:
        """Note a step that was taken, then do what is due after it."""
        samples = range(batch.consumed_samples - self.config.training.global_batch_size, batch.consumed_samples)
        self.state.bad_steps.record(self.state.step, tuple(samples), result.skipped)
        self.empty_steps.record(self.state.step, batch.num_targets)
        self.report.step_done()
        settings = self.config
        due = [  # in this order: (every so many steps, or 0 for never; whether after the last step, too; what)
            (settings.logging.every, True, lambda: self.log(batch, result, rate)),
            (1, True, self.end_where_too_many_are_bad),
            (settings.logging.stragglers_every if self.ranks.size > 1 else 0, False, lambda: self.report.stragglers(self.state.step)),
            (settings.run.check_replicas_every, False, self.check_replicas),
            (settings.evaluation.every, True, self.evaluate),
        ]
        for every, at_the_end, action in due:
            if every and (self.state.step % every == 0 or at_the_end and self.state.step == self.last_step):
                action()

    def keep(self) -> str | None:
        """Save and export what is due after a step; returns what to leave for, with the state saved."""
        signal = self.leave.after_step(self.keeper.saver.failed)
        failed = self.leave.failed and self.keeper.saver.settle()
        if signal or failed or should_save(self.state.step, self.config.checkpoint, self.last_step):
            self.save()
        if signal or self.state.step == self.last_step:
            self.keeper.finish_saves()
        self.keeper.export_if_due()
        self.keeper.report_saves()
        if self.profile.is_due(self.state.step, leaving=bool(signal) or self.state.step == self.last_step):
            self.keeper.finish_saves()
            self.watchdog.at(self.state.step, "profile")
            self.report.event("profile", self.state.step, f"step {self.state.step}: {self.profile.write()}")
        return signal

    def log(self, batch: StepBatch, result: StepResult, rate: float | Tensor) -> None:
        """Write the step down, and what was noticed since the last time."""
        self.watchdog.measured(self.report.step(self.state.step, batch, result, rate))
        self.look_at_bad_steps()

    def end_where_too_many_are_bad(self) -> None:
        """Look at the bad steps where so many are unread that they may end the run."""
        if self.state.bad_steps.may_have_passed_limit():
            self.look_at_bad_steps()

    def look_at_bad_steps(self) -> None:
        """Name the steps without a target and the updates that were skipped since the last call, with their samples. Too many
        skipped in a row end the run, its state saved."""
        for step in self.empty_steps.collect():
            message = f"step {step}: none of its tokens is to be predicted; momentum and weight decay alone moved the weights"
            self.report.event("empty step", step, message)
        for bad in self.state.bad_steps.collect():
            self.report.event("bad step", bad.step, str(bad), sample_ids=list(bad.sample_ids))
        if found := self.state.verdict(self.state.step):
            self.keeper.save()
            self.keeper.finish_saves()
            raise found

    def check_replicas(self) -> None:
        """End the run where ranks differ in what they should hold alike: a restart goes on before that."""
        if found := check_replicas(copies(self.config, self.mesh, self.state.optimizer), self.ranks):
            raise UserError(
                f"step {self.state.step}: {found}; the run goes on from its last checkpoint, whose replicas agreed."
            )

    def evaluate(self) -> None:
        """Loss on the validation data, into the log."""
        settings, step = self.config.evaluation, self.state.step
        size = settings.batches * self.config.training.global_batch_size
        before = -(-step // settings.every) - 1 if settings.rotate else 0  # evaluations, in every layout and after every resume
        losses = self.train_step.losses
        with self.report.throughput.paused():
            chosen = batches_of(self.data.valid, self.config, self.mesh, losses.device, before * size, settings.batches)
            batches = self.while_listening(chosen)
            loss = evaluate(self.train_step.engine, losses, batches)
        found = f"no validation loss: none of the tokens in its {settings.batches} batches is to be predicted"
        if loss is not None:
            found = f"validation loss {in_words(loss, self.config.data.tokenizer)} over {settings.batches} batches"
        self.report.event("evaluation", step, f"step {step}: {found}", loss=loss)

    def while_listening(self, batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """The batches of an evaluation. A request to leave that comes meanwhile is answered by a save: the launcher may not
        wait for the end."""
        for batch in batches:
            self.watchdog.at(self.state.step, "evaluate")
            yield batch
            if self.leave.after_step(self.keeper.saver.failed):
                self.save()

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self.keeper.saver.last_step != self.state.step:
            self.look_at_bad_steps()
            if (every := self.config.run.check_replicas_every) and self.state.step % every:  # else they have just been checked
                self.check_replicas()
            self.keeper.save()
