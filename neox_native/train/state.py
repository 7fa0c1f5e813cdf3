"""Everything that changes while a run trains: what a checkpoint holds of it, and how it goes on from one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate

from neox_native.checkpoint import files, store
from neox_native.checkpoint.resume import Start
from neox_native.checkpoint.tokenizer_files import tokenizer_facts
from neox_native.config.check import adaptations, kept_rows, other_model
from neox_native.config.schema import Config
from neox_native.data.build import Datasets
from neox_native.engine.step import TrainStep
from neox_native.errors import UserError
from neox_native.interop.checkpoints import PREFIX
from neox_native.launch import Ranks
from neox_native.mesh import Mesh
from neox_native.model.masks import generator_of
from neox_native.reliability.bad_steps import BadSteps
from neox_native.train import fits
from neox_native.zero.layout import ZeroStage
from neox_native.zero.optimizer import ShardedOptimizer
from neox_native.zero.state import first_rows, optimizer_state
from neox_native.zero.spec import local

VOCABULARY = ("model.embed_in.weight", "model.embed_out.weight")
"""What has a row for each token id."""
OPTIONAL = ("loss_scale.", "spike_guard.", "rng.")
"""Names that a checkpoint of other settings may lack; they then keep their first values. Earlier versions saved random
states."""
BAD_STEPS = "bad_steps_in_a_row"
"""Name in a checkpoint's metadata of what `BadSteps.count` was."""
SHAPE_THE_TRAINING = ("model", "data", "training", "objective", "optimizer", "lr_schedule")
"""Sections in which a change may lead a run out of its bad steps."""


class RunState:
    """Weights, optimizer state, loss scale, the spike guard's window, bad steps, and how far the run has come.

    Args:
        step: has the optimizer, the loss scale and the guard.
        data: its order and its tokenizer are told with each checkpoint.
        directory: the run's `checkpoints/` folder.
    """

    def __init__(
        self, config: Config, device: torch.device, ranks: Ranks, step: TrainStep, data: Datasets, directory: Path
    ) -> None:
        self.config, self.ranks, self.directory = config, ranks, directory
        self.optimizer, self.loss_scale, self.spike_guard = step.optimizer, step.loss_scale, step.spike_guard
        self.bad_steps = BadSteps(config.training)
        self.step, self.consumed_samples = 0, 0
        self.tokenizer, self.tokenizer_files = tokenizer_facts(config.data.tokenizer, data.tokenizer)
        self.fingerprint, self.runtime = data.train.fingerprint(), fits.runtime_of(device, ranks)

    def tensors(self) -> store.State:
        """What a checkpoint holds, under global names; the tensors are the live ones."""
        state = dict(self.optimizer.state_dict())
        if self.loss_scale:
            state |= {f"loss_scale.{name}": value for name, value in self.loss_scale.state_dict().items()}
        if self.spike_guard:
            state[f"spike_guard.{self.spike_guard.window}"] = self.spike_guard.state
        return state

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says about itself."""
        told = fits.metadata(self.config, self.step, self.consumed_samples, self.fingerprint, self.runtime)
        return told | self.tokenizer | {BAD_STEPS: self.bad_steps.count}

    def start_from(self, start: Start | None) -> None:
        """Take over a checkpoint, the weights of another run, or nothing (None). A collective.

        Raises `UserError` on all ranks where it does not fit, before anything has changed.
        """
        fits.require_one_kind(self.config, self.runtime)
        if start is None:
            return
        if start.weights_only:
            remarks = self._load_weights(start.path)
            self.ranks.say(" ".join([f"starts from the weights of {start.path}", *(f"({remark})" for remark in remarks)]))
        else:
            self._resume(start.path)
            self.ranks.say(f"resumed {start.path} at step {self.step}")

    def _resume(self, path: Path) -> None:
        """Go on from a verified checkpoint of this run."""
        with self.ranks.together(f"Opening {path}"):
            saved = files.read_metadata(path)
        fits.check_fits(saved, self.config, self.fingerprint, self.runtime, self.tokenizer.get("tokenizer_sha256", ""))
        self._count_bad_steps_on(saved)
        store.load(path, self.tensors(), self.ranks, lenient=OPTIONAL, verified=True)
        self.optimizer.after_load()
        self.step, self.consumed_samples = saved["step"], saved["consumed_samples"]
        for sentence in fits.what_becomes_of_numbers(saved, self.config):
            self.ranks.say(sentence)

    def _load_weights(self, path: Path) -> list[str]:
        """Take the weights of a verified checkpoint of the same model, whose vocabulary may be smaller; returns a sentence for
        each thing that the run must learn anew. Rows of the embedding and the head that it does not have keep their values.
        """
        with self.ranks.together(f"Opening {path}"):
            trained = fits.config_of(files.read_metadata(path))
        if found := other_model(trained, self.config):
            raise UserError(" ".join(found))
        rows, kept = trained.model.padded_vocab_size, kept_rows(trained, self.config)
        grows = kept < self.config.model.padded_vocab_size
        weights = {
            name: first_rows(value, kept, rows) if grows and name in VOCABULARY else value
            for name, value in self.tensors().items()
            if name.startswith(PREFIX)
        }
        store.load(path, weights, self.ranks, only=PREFIX, verified=True)
        self.optimizer.after_load()
        return adaptations(trained, self.config)

    def _count_bad_steps_on(self, saved: dict[str, Any]) -> None:
        """Count bad steps on from a checkpoint's metadata, unless a setting of the training has changed since.

        Raises `UserError` where they had ended the run: on the same settings it would only end again.
        """
        before, count = fits.config_of(saved), saved.get(BAD_STEPS)
        recomputation = {name: getattr(before.training, name) for name in ("activation_checkpointing", "recompute_every")}
        training = replace(self.config.training, **recomputation)  # the same numbers
        now = replace(self.config, training=training)
        changed = any(getattr(before, name) != getattr(now, name) for name in SHAPE_THE_TRAINING)
        if isinstance(count, int) and not changed:
            self.bad_steps.go_on_from(count)
            if found := self.verdict(saved["step"]):
                raise found

    def verdict(self, step: int) -> UserError | None:
        """What ends the run after `step`, or None; it names the newest checkpoint from before the bad steps."""
        if not self.bad_steps.verdict():
            return None
        first = step - self.bad_steps.longest
        older = [path for path in files.finished(self.directory) if (files.step_of(path) or 0) <= first]
        return self.bad_steps.verdict(str(older[0]) if older else "")


def copies(
    config: Config, mesh: Mesh, optimizer: ShardedOptimizer
) -> Iterator[tuple[str, dist.ProcessGroup, list[tuple[str, Tensor]]]]:
    """What several ranks hold alike, with the name of the axis along which they differ.

    - dp: weights and moments in stage 0, or their shards where ZeRO shards inside groups. Inside such a group, or all of dp,
      stages 1 and 2 copy trained weights from their one owner in every step, so only frozen ones can drift apart; in stage 3
      each weight has one owner.
    - tp: replicated weights, the rows of shared heads, and the random state that drops the same elements of the same
      residual stream.
    - pp: the embedding of the first and the last stage, where it is tied.
    """
    held: dict[str, tuple[dist.ProcessGroup, list[tuple[str, Tensor]]]] = {}
    for unit in optimizer.units:
        if unit.replicas is not None:
            _, alike = held.setdefault(unit.replicas.group_name, (unit.replicas, []))
            alike += [(spec.name, shard) for spec, shard in zip(unit.specs, unit.shards)]
            for spec, shard in zip(unit.specs, unit.shards[: len(unit.gradients.shards)]):
                state = optimizer_state(optimizer.optimizer, shard)
                alike += [(f"{name} of {spec.name}", moment) for name, moment in state.items() if moment.dim()]
        if unit.zero_stage in (ZeroStage.OPTIMIZER, ZeroStage.GRADIENTS):
            _, alike = held.setdefault(unit.group.group_name, (unit.group, []))
            alike += [(spec.name, local(spec.parameter)) for spec in unit.specs if not spec.parameter.requires_grad]
    for group, alike in held.values():
        yield mesh.rows.name, group, alike
    specs, tp_group = optimizer.specs(), mesh.tensor.group
    state = optimizer.state_dict()
    masters = {spec.name: state[f"model.{spec.name}"].to_local() for spec in specs}
    replicated = [(spec.name, masters[spec.name]) for spec in specs if isinstance(spec.placement, Replicate)]
    if not config.parallel.sequence_parallel:
        replicated.append(("the random state", generator_of(optimizer.device).get_state()))
    yield mesh.tensor.name, tp_group, replicated
    for spec in specs:
        if spec.shared is not None:
            own, _ = state[f"model.{spec.name}"].ranges
            yield mesh.tensor.name, spec.shared.group, [(spec.name, masters[spec.name][len(own) :])]
        for group in spec.sum_over:
            if group.group_name != tp_group.group_name:
                yield mesh.pipeline.name, group, [(spec.name, masters[spec.name])]
