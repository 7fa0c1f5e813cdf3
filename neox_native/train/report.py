"""What is told of a run: each logged step's numbers, reduced over the ranks, and what happens between the steps.

Reading the numbers waits for the device. Nothing else in training does, and it happens on logged steps alone."""

from __future__ import annotations

import dataclasses
import datetime
import math
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neox_native import tool_command
from neox_native.checkpoint.resume import Start
from neox_native.config.load import dump
from neox_native.config.schema import Config
from neox_native.data.loader import StepBatch, format_hash
from neox_native.engine.step import StepResult, TrainStep
from neox_native.launch import Ranks
from neox_native.mesh import Mesh
from neox_native.metrics.throughput import Throughput, device_name, memory_bytes, peak_flops_per_second, peak_memory_bytes
from neox_native.metrics.writers import Scale, StepRecord, Writers
from neox_native.model.flops import model_flops_per_token, total_parameters
from neox_native.parallel.timing import Stopwatch
from neox_native.plan.costs import predict  # all that training takes from the planner
from neox_native.reliability.stragglers import slowest_ranks
from neox_native.train import provenance
from neox_native.units import count, counted, share_of_step


class Report:
    """Writes a run down. All ranks call it, because numbers are summed over them; rank 0 writes.

    Args:
        train_step: its losses and its named metrics are summed over the ranks; its engine's timing is read.
        resumed_step: steps already done; what was logged beyond is cut off.
    """

    def __init__(self, config: Config, mesh: Mesh, ranks: Ranks, train_step: TrainStep, resumed_step: int) -> None:
        self.config, self.mesh, self.ranks, self.resumed_step = config, mesh, ranks, resumed_step
        self.losses, self.timing = train_step.losses, train_step.engine.timing
        self.loss_scale, self.device = train_step.loss_scale, train_step.losses.device
        device, training = self.device, config.training
        self.writers: Writers | None = None
        if ranks.is_first:
            scale = Scale(training.steps, config.model.seq_length, memory_bytes(device))
            self.writers = Writers(Path(config.run.dir), resumed_step, scale, dump(config), config.logging.tensorboard)
        ranks.say(self._opening())
        self.throughput = Throughput(
            tokens_per_step=training.global_batch_size * config.model.seq_length,
            flops_per_token=(model_flops_per_token(config.model), model_flops_per_token(config.model, causal=True)),
            devices=ranks.size,
            peak=peak_flops_per_second(device_name(device), training.precision),
            pauses=Stopwatch(device),
        )
        self.metrics = sorted(set().union(*ranks.gather(train_step.metrics)))
        self.compute_seconds, self.steps = 0.0, 0
        """What this rank has computed, and the steps done, since stragglers were last named."""
        self.predicted = predict(config)
        sentence = self.predicted.sentence(with_memory=device.type == "cuda")
        self.event("prediction", resumed_step, f"step {resumed_step}: {sentence}", **dataclasses.asdict(self.predicted))

    def started(self, start: Start | None, changed: list[str]) -> None:
        """Write down with what, where and from what this start goes on, and which settings it changes. A collective."""
        resumed, step = start is not None and not start.weights_only, self.resumed_step
        where = provenance.origin(self.mesh.layout, self.ranks.gather(socket.gethostname()))
        kind, path = "resumed" if resumed else "started", str(start.path) if start else None
        for line in ["changed since the last start:", *(f"  {line}" for line in changed)] if changed else []:
            self.ranks.say(line)
        self.event(kind, step, f"step {step}: {kind} {provenance.in_words(where)}", checkpoint=path, changed=changed, **where)

    def step(self, step: int, batch: StepBatch, result: StepResult, rate: float | Tensor) -> float:
        """Write a step; returns the seconds a step took since the last call."""
        read = torch.tensor([batch.row_hash, batch.num_targets], device=self.device)
        dist.all_reduce(read, group=self.mesh.rows.group)
        batch_hash, num_targets = read.tolist()
        loss = self.losses.total(result.loss).item() if num_targets else math.nan  # of no target there is none
        peak = torch.tensor(peak_memory_bytes(self.device), device=self.device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        metrics = self._metrics(result)
        extra = self._for_the_console()
        speed = self.throughput.speed()
        record = StepRecord(
            step=step,
            loss=loss,
            grad_norm=result.grad_norm.item(),
            learning_rate=float(rate),
            consumed_samples=batch.consumed_samples,
            tokens_per_second=speed.tokens_per_second,
            step_seconds=speed.step_seconds,
            tflops_per_device=speed.tflops_per_device,
            mfu=speed.mfu,
            mfu_causal=speed.mfu_causal,
            peak_memory_bytes=int(peak.item()),
            batch_hash=format_hash(batch_hash),
        )
        if self.writers:
            self.writers.step(record, extra, metrics)
        return speed.step_seconds

    def _metrics(self, result: StepResult) -> dict[str, float]:
        """The step's named metrics, from all ranks' shares."""
        if not self.metrics:
            return {}
        totals = self.losses.totals([result.metrics.get(name) for name in self.metrics])
        return dict(zip(self.metrics, totals.tolist()))

    def _for_the_console(self) -> dict[str, float]:
        """fp16's loss scale; the memory that was predicted; and the share of the time since the last call in which the
        pipeline idled, measured and predicted. A CPU's memory is its whole process's: nobody predicts it."""
        compute, whole = self.timing.compute.read(), self.timing.whole.read()
        self.compute_seconds += compute
        found = {"loss scale": self.loss_scale.scale.item()} if self.loss_scale else {}
        if self.predicted.peak_bytes is not None and self.device.type == "cuda":
            found["predicted GiB"] = self.predicted.peak_bytes / 2**30
        if self.mesh.pipeline.size > 1:
            seconds = torch.tensor([compute, whole], device=self.device)
            dist.all_reduce(seconds)
            found["bubble"] = 1 - (seconds[0] / seconds[1]).item()
            found["predicted bubble"] = share_of_step(self.predicted.bubble_fraction)
        return found

    def step_done(self) -> None:
        """Count one more step."""
        self.throughput.step_done()
        self.steps += 1

    def stragglers(self, step: int) -> None:
        """Name the slowest rank of each pipeline stage since the last call."""
        seconds = self.compute_seconds + self.timing.compute.read()
        mine = self.mesh.pipeline.rank, socket.gethostname(), seconds / self.steps
        self.compute_seconds, self.steps = 0.0, 0
        self.event("stragglers", step, f"step {step}: " + "; ".join(slowest_ranks(self.ranks.gather(mine))))

    def event(self, kind: str, step: int, message: str, **values: Any) -> None:
        """Write something that is no training step."""
        if self.writers:
            self.writers.event(kind, step, message, **values)

    def _opening(self) -> str:
        """What trains where, and for how long."""
        config, training = self.config, self.config.training
        tokens, code = training.global_batch_size * config.model.seq_length, "compiled" if config.compile.on else "eager"
        return (
            f"{count(total_parameters(config.model))} parameters in {training.precision}, {code}, on {self.ranks.size} x "
            f"{device_name(self.device)}; {tokens:,} tokens a step, {count(tokens * training.steps)} in "
            f"{counted(training.steps, 'step')}; run folder {config.run.dir}"
        )

    def finished(self, checkpoint: Path) -> None:
        """The last lines of a whole run: what came out, where it lies, and what can be done with it."""
        if self.writers is None:
            return
        took = datetime.timedelta(seconds=round(self.writers.elapsed_seconds()))
        best = "".join(f"best validation loss {loss:.4f}, after step {step}; " for loss, step in filter(None, [self.writers.best]))
        print(f"finished in {took}; {best}saved {checkpoint}")
        print(f"next: {tool_command('generate')} --checkpoint {checkpoint.parents[1]}")

    def sync(self) -> None:
        """Flush what is written to the disk."""
        if self.writers:
            self.writers.sync()

    def close(self) -> None:
        """Flush and close the files."""
        if self.writers:
            self.writers.close()
