"""What a step's numbers become: reduced over the ranks, then one line in the log. The only part of training that waits
for the device, and on logged steps alone."""

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
from neox_native.config.load import dump
from neox_native.config.schema import Config
from neox_native.data.loader import StepBatch, format_hash
from neox_native.engine.step import Losses, StepResult
from neox_native.launch import Ranks
from neox_native.mesh import Mesh
from neox_native.metrics.throughput import Throughput, device_name, memory_bytes, peak_flops_per_second, peak_memory_bytes
from neox_native.metrics.writers import Scale, StepRecord, Writers
from neox_native.model.flops import model_flops_per_token, total_parameters
from neox_native.parallel.timing import Timing
from neox_native.plan import costs
from neox_native.reliability.watchdog import slowest_ranks
from neox_native.units import count, counted, share_of_step


class Report:
    """Writes a run down. All ranks call it, because numbers are summed over them; rank 0 writes.

    Args:
        losses: sums shares of a loss over the ranks.
        timing: the engine's.
        resumed_step: steps already done; what was logged beyond is cut off.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        device: torch.device,
        ranks: Ranks,
        losses: Losses,
        timing: Timing,
        resumed_step: int,
    ):
        self.mesh, self.device, self.ranks, self.losses, self.timing = mesh, device, ranks, losses, timing
        training = config.training
        self.writers: Writers | None = None
        if ranks.rank == 0:
            folder, board = Path(config.run.dir), config.logging.tensorboard
            scale = Scale(training.steps, config.model.seq_length, memory_bytes(device))
            self.writers = Writers(folder, resumed_step, scale, dump(config), board)
            print(self._opening(config, device))
        self.throughput = Throughput(
            tokens_per_step=training.global_batch_size * config.model.seq_length,
            flops_per_token=model_flops_per_token(config.model),
            devices=ranks.size,
            peak=peak_flops_per_second(device_name(device), training.precision),
        )
        self.predicted = costs.predict(config)
        sentence = self.predicted.sentence(with_memory=device.type == "cuda")
        self.event("prediction", resumed_step, f"step {resumed_step}: {sentence}", **dataclasses.asdict(self.predicted))
        self.steps_since_stragglers = 0
        self.compute_seconds = 0.0

    def step(
        self, step: int, batch: StepBatch, result: StepResult, rate: float | Tensor, extra: dict[str, Any]
    ) -> float:
        """Write a step; returns the seconds a step took since the last call."""
        read = torch.tensor([batch.row_hash, batch.num_targets], device=self.device)
        dist.all_reduce(read, group=self.mesh.rows.group)
        batch_hash, num_targets = read.tolist()
        loss = self.losses.total(result.loss).item() if num_targets else math.nan  # of no target there is none
        peak = torch.tensor(peak_memory_bytes(self.device), device=self.device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        extra = extra | self._beside_predicted()
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
            peak_memory_bytes=int(peak.item()),
            batch_hash=format_hash(batch_hash),
        )
        if self.writers:
            self.writers.step(record, extra)
        return speed.step_seconds

    def _beside_predicted(self) -> dict[str, float]:
        """Of memory, which is measured elsewhere, what was predicted; of the share of the time since the last call in which
        the pipeline idled both. A CPU's memory is the whole process's, which nobody predicts."""
        compute, whole = self.timing.compute.read(), self.timing.whole.read()
        self.compute_seconds += compute
        predicted = {"predicted GiB": self.predicted.peak_bytes / 2**30} if self.device.type == "cuda" else {}
        if self.mesh.pipeline.size == 1:
            return predicted
        seconds = self.losses.total(torch.tensor([compute, whole], device=self.device)).tolist()
        idle = {"bubble": 1 - seconds[0] / seconds[1], "predicted bubble": share_of_step(self.predicted.bubble_fraction)}
        return predicted | idle

    def step_done(self) -> None:
        """Count one more step."""
        self.throughput.step_done()
        self.steps_since_stragglers += 1

    def stragglers(self, step: int) -> None:
        """Name the slowest rank of each pipeline stage since the last call."""
        self.compute_seconds += self.timing.compute.read()
        seconds_per_step = self.compute_seconds / self.steps_since_stragglers
        self.compute_seconds, self.steps_since_stragglers = 0.0, 0
        lines = slowest_ranks(
            self.ranks.gather((self.mesh.pipeline.rank, socket.gethostname(), seconds_per_step))
        )
        self.event("stragglers", step, f"step {step}: " + "; ".join(lines))

    def event(self, kind: str, step: int, message: str, **values: Any) -> None:
        """Write something that is no training step."""
        if self.writers:
            self.writers.event(kind, step, message, **values)

    def _opening(self, config: Config, device: torch.device) -> str:
        """What trains where, and for how long."""
        training = config.training
        tokens = training.global_batch_size * config.model.seq_length
        return (
            f"{count(total_parameters(config.model))} parameters in {training.precision} on {self.ranks.size} x "
            f"{device_name(device)}; {tokens:,} tokens a step, {count(tokens * training.steps)} in {counted(training.steps, 'step')}; "
            f"run folder {config.run.dir}"
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
