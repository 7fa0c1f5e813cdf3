"""The loop around the steps: resume, train, log, evaluate, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from neox_native.checkpoint import store
from neox_native.checkpoint.agree import Ranks
from neox_native.checkpoint.resume import find_start
from neox_native.checkpoint.retention import should_save
from neox_native.checkpoint.saver import Saver
from neox_native.config.load import dump
from neox_native.config.schema import Config
from neox_native.data.build import Datasets
from neox_native.data.loader import StepBatch, build_loader, format_hash
from neox_native.metrics.throughput import Throughput, device_name, peak_flops_per_second, peak_memory_bytes
from neox_native.metrics.writers import StepRecord, Writers
from neox_native.model.flops import model_flops_per_token
from neox_native.model.transformer import Transformer
from neox_native.optim.loss_scale import LossScale
from neox_native.optim.schedule import learning_rate
from neox_native.train import state as run_states
from neox_native.train.build import build_engine
from neox_native.train.evaluate import evaluate, evaluation_number
from neox_native.train.step import Losses, StepResult, TrainStep
from neox_native.zero.optimizer import ShardedOptimizer


class Trainer:
    """A run from its first or its resumed step to its last.

    Args:
        config: checked and resolved.
        parts: this rank's parts of the model, as `build_model` made them.
        optimizer: the owner of their parameters.
        data: what to read.
        ranks: for agreement over saving and loading.
    """

    def __init__(
        self,
        config: Config,
        mesh: DeviceMesh,
        device: torch.device,
        parts: dict[int, Transformer],
        optimizer: ShardedOptimizer,
        data: Datasets,
        ranks: Ranks,
    ):
        self.config, self.mesh, self.device, self.data, self.ranks = config, mesh, device, data, ranks
        self.parts, self.optimizer = parts, optimizer
        self.engine = build_engine(config, mesh, device, parts, optimizer)
        self.losses = Losses(mesh, device)
        self.loss_scale = LossScale(config.training, device) if config.training.precision == "fp16" else None
        self.train_step = TrainStep(self.engine, optimizer, self.losses, config.training.clip_grad_norm, self.loss_scale)
        self.checkpoints = Path(config.run.dir) / "checkpoints"
        self.saver = Saver(self.checkpoints, config.checkpoint)
        self.fingerprint = data.train.fingerprint()
        self.step, self.consumed_samples = 0, 0
        self.writers: Writers | None = None

    def run(self) -> None:
        """Train until `training.steps`; whatever is due after a step happens in this order: log, evaluate, save."""
        run_states.seed_dropout(self.config, self.mesh)
        self.resume()
        if self.ranks.rank == 0:
            logging = self.config.logging
            self.writers = Writers(
                Path(self.config.run.dir), self.step, self.config.training.steps, dump(self.config), logging.tensorboard, self.show
            )
        self.throughput = self._throughput()
        total_steps = self.config.training.steps
        if self.step == 0 and should_save(0, self.config.checkpoint, total_steps):
            self.save()
        for batch in self.batches("train", self.consumed_samples, total_steps - self.step):
            rate = learning_rate(self.step + 1, self.config.lr_schedule, self.config.optimizer.lr, total_steps)
            result = self.train_step(batch, rate)
            self.step, self.consumed_samples = self.step + 1, batch.consumed_samples
            self.throughput.step_done()
            last = self.step == total_steps
            if last or self.step % self.config.logging.every == 0:
                self.log(batch, result, rate)
            with self.throughput.paused():
                every = self.config.evaluation.every
                if every and (last or self.step % every == 0):
                    self.evaluate()
                if should_save(self.step, self.config.checkpoint, total_steps):
                    self.save()
            self.report_saves()
        self.saver.wait()
        self.report_saves()
        if self.writers:
            self.writers.close()

    def report_saves(self) -> None:
        """Write down the checkpoints that have been finished."""
        for saved in self.saver.reports():
            if self.writers:
                self.writers.event("checkpoint", saved.step, str(saved), stall_seconds=saved.stall_seconds)

    def batches(self, part: str, consumed_samples: int, steps: int):
        """This data rank's batches of "train" or "valid" from a sample on."""
        training = self.config.training
        return build_loader(
            getattr(self.data, part),
            consumed_samples=consumed_samples,
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            dp_rank=self.mesh.get_local_rank("dp"),
            dp_size=self.mesh["dp"].size(),
            stop_after_steps=steps,
            pin_memory=self.device.type == "cuda",
        )

    def show(self, message: str) -> None:
        """Print a line, on rank 0."""
        if self.ranks.rank == 0:
            print(message, flush=True)

    def total(self, value: Tensor) -> Tensor:
        """Sum of a value over the dp and pp ranks of this tp rank."""
        value = value.detach().double() if value.is_floating_point() else value.clone()
        for axis in ("dp", "pp"):
            dist.all_reduce(value, group=self.mesh.get_group(axis))
        return value

    def log(self, batch: StepBatch, result: StepResult, rate: float) -> None:
        """Write the step down. The only place in training that waits for the device."""
        loss = self.total(result.loss).item()
        batch_hash = torch.tensor(batch.row_hash, device=self.device)
        dist.all_reduce(batch_hash, group=self.mesh.get_group("dp"))
        peak = torch.tensor(peak_memory_bytes(self.device), device=self.device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        speed = self.throughput.speed()
        record = StepRecord(
            step=self.step,
            loss=loss,
            grad_norm=result.grad_norm.item(),
            learning_rate=rate,
            consumed_samples=self.consumed_samples,
            tokens_per_second=speed.tokens_per_second,
            step_seconds=speed.step_seconds,
            tflops_per_device=speed.tflops_per_device,
            mfu=speed.mfu,
            peak_memory_bytes=int(peak.item()),
            batch_hash=format_hash(int(batch_hash.item())),
        )
        extra: dict[str, Any] = {}
        if self.loss_scale:
            extra["loss scale"] = self.loss_scale.scale.item()
        if self.writers:
            self.writers.step(record, extra)

    def evaluate(self) -> None:
        """Loss on the validation data, into the log."""
        settings = self.config.evaluation
        size = settings.batches * self.config.training.global_batch_size
        first = evaluation_number(self.step, settings.every) * size
        share = evaluate(self.engine, self.parts.values(), self.losses, self.batches("valid", first, settings.batches))
        loss = self.total(share).item()
        if self.writers:
            message = f"step {self.step}: validation loss {loss:.4f} over {settings.batches} batches"
            self.writers.event("evaluation", self.step, message, loss=loss)

    def save(self) -> None:
        """Write a checkpoint of this step."""
        metadata = run_states.metadata(self.config, self.step, self.consumed_samples, self.fingerprint)
        self.saver.save(self.step, self.state(), metadata)

    def state(self) -> store.State:
        """The tensors of a checkpoint; they alias what they show."""
        return run_states.run_state(self.optimizer, self.loss_scale, self.mesh, self.device)

    def resume(self) -> None:
        """Start from what the [checkpoint] section says: a checkpoint, another run's weights, or anew."""
        start = find_start(self.config.checkpoint, self.checkpoints, self.ranks, self.show)
        if start is None:
            return
        state = self.state()
        if start.weights_only:
            weights = {name: value for name, value in state.items() if name.startswith("model.")}
            store.load(start.path, weights, self.ranks, only="model.", verified=True)
            self.optimizer.after_load()
            self.show(f"starts from the weights of {start.path}")
            return
        saved = store.load(start.path, state, self.ranks, lenient=run_states.LAYOUT_DEPENDENT, verified=True)
        run_states.check_fits(saved, self.config, self.fingerprint)
        self.optimizer.after_load()
        run_states.restore_random_state(state, self.device)
        self.step, self.consumed_samples = saved["step"], saved["consumed_samples"]
        self.show(f"resumed {start.path} at step {self.step}")

    def _throughput(self) -> Throughput:
        training, model = self.config.training, self.config.model
        return Throughput(
            tokens_per_step=training.global_batch_size * model.seq_length,
            flops_per_token=model_flops_per_token(model),
            devices=self.ranks.size,
            peak=peak_flops_per_second(device_name(self.device), training.precision),
        )


