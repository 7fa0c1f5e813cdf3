"""No unlogged step waits for the device: the training loop on a GPU that does not exist, where every wait is an error."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from neox_native.config.check import require
from neox_native.config.load import load
from neox_native.config.schema import Config
from neox_native.data.loader import StepBatch
from neox_native.engine.step import TrainStep
from neox_native.mesh import build_mesh
from neox_native.metrics.throughput import Throughput
from neox_native.parallel.timing import Stopwatch
from neox_native.plan.dry_run import fake_batch, fake_process_group, fake_step
from neox_native.reliability.bad_steps import BadSteps
from neox_native.train import loop
from neox_native.train.evaluate import evaluate
from tests.fake_cuda import CUDA, Waits, fake_cuda, no_waits

WAITS = (Waits, DataDependentOutputException, DynamicOutputShapeException)
SMALL = {
    "model": "num_layers=2 hidden_size=32 num_heads=4 seq_length=16 vocab_size=64",
    "training": "micro_batch_size=2 loss_slice_tokens=8 spike_threshold=3 steps=100",
    "logging": "every=50",
    "evaluation": "every=0",
}
slow = partial(pytest.param, marks=pytest.mark.slow)
DOCUMENTS = "data.document_attention=true data.document_positions=true"


def config_of(settings: str) -> Config:
    """The small config with settings "section.name=value ...", for as many ranks as its layout has."""
    given = [f"--{section}.{each}" for section, all_of in SMALL.items() for each in all_of.split()]
    config = load("configs/quickstart.toml", [*given, "--training.global_batch_size=8", *(f"--{each}" for each in settings.split())])
    parallel = config.parallel
    return require(config, parallel.pp * parallel.dp * parallel.tp)


@contextmanager
def stepping(config: Config, rank: int = 0) -> Iterator[TrainStep]:
    """What a rank trains with on the GPU that does not exist, between two of its steps."""
    parallel = config.parallel
    with fake_cuda(), fake_process_group(rank, parallel.pp * parallel.dp * parallel.tp):
        with fake_step(config, build_mesh(parallel, CUDA), CUDA) as step:
            yield step


def none_waiting(batches: list[StepBatch], first: int = 0) -> Generator[StepBatch, None, None]:
    """The batches; from number `first` on, whoever reads them must not wait."""
    with no_waits(but_for_copies=True):
        yield from batches[:first]
    with no_waits():
        yield from batches[first:]


def train(config: Config, step: TrainStep, num_steps: int) -> None:
    """So many steps of the loop, none of which is logged. What speaks to people and disks is none of ours here."""
    pauses = Stopwatch(CUDA)
    report = mock.Mock(throughput=Throughput(1, (1, 1), 1, None, pauses))
    state = SimpleNamespace(step=0, consumed_samples=0, bad_steps=BadSteps(config.training), loss_scale=step.loss_scale)
    keeper = mock.Mock()
    keeper.saver.failed = False
    leave = mock.Mock(**{"after_step.return_value": None}, failed=False)
    with mock.patch.object(loop, "LeaveRequest", return_value=leave):
        ranks = SimpleNamespace(rank=0, size=1)
        trainer = loop.Trainer(config, step.losses.mesh, ranks, step, None, state, report, keeper, mock.Mock(), mock.Mock())
        first = int(config.parallel.pp > 1)  # torch's schedules set themselves up in their first step
        with closing(none_waiting([fake_batch(config)] * num_steps, first)) as batches:
            trainer.train(batches)
    assert state.step == num_steps and not keeper.save.called and not report.step.called and pauses.events


@pytest.mark.parametrize(
    "settings",
    [
        slow(f"parallel.dp=1 {DOCUMENTS} training.activation_checkpointing=full"),
        f"parallel.dp=1 {DOCUMENTS} training.precision=fp16 model.num_kv_heads=2 training.activation_checkpointing=selective",
        f"parallel.dp=1 {DOCUMENTS} model.pos_emb=alibi model.attention_dropout=0.1 model.hidden_dropout=0.1 training.precision=bf16",
        slow("parallel.dp=1 model.tie_embeddings=true training.clip_grad_norm=0"),
        "parallel.dp=2 parallel.zero_stage=1 run.determinism=elastic training.precision=fp16",
        slow("parallel.dp=2 parallel.zero_stage=2 run.determinism=bitwise"),
        slow("parallel.dp=2 parallel.zero_stage=0 training.precision=bf16 training.activation_checkpointing=full"),
        "parallel.dp=2 parallel.zero_stage=3 training.precision=bf16 training.activation_checkpointing=selective",
        "parallel.dp=2 parallel.tp=2 parallel.sequence_parallel=true parallel.zero_stage=1 training.precision=bf16",
        slow("parallel.dp=1 parallel.tp=2 run.determinism=elastic model.hidden_dropout=0.1"),
    ],
)
def test_the_loop_waits_for_nothing(settings: str) -> None:
    config = config_of(settings)
    with stepping(config) as step:
        train(config, step, 2)


@pytest.mark.parametrize(
    "settings, rank",
    [
        *(slow("gpipe", rank) for rank in (0, 1)),
        *(slow("1f1b training.precision=fp16 training.activation_checkpointing=selective", rank) for rank in (0, 1)),
        *(slow("interleaved_1f1b parallel.virtual_stages=2", rank) for rank in (0, 1)),
        *(slow("looped_bfs parallel.virtual_stages=2", rank) for rank in (0, 1)),
        *(slow("interleaved_zero_bubble parallel.virtual_stages=2 training.activation_checkpointing=full", rank) for rank in (0, 1)),
        ("zbv parallel.virtual_stages=2 training.precision=bf16 training.activation_checkpointing=selective", 0),
        slow(f"zbv parallel.virtual_stages=2 {DOCUMENTS} training.activation_checkpointing=full", 1),
    ],
)
def test_no_stage_of_a_pipeline_waits(settings: str, rank: int) -> None:
    config = config_of(f"model.num_layers=4 parallel.dp=1 parallel.pp=2 parallel.pipeline_schedule={settings}")
    with stepping(config, rank) as step:
        train(config, step, 2)


@pytest.mark.parametrize("settings", [f"parallel.dp=1 {DOCUMENTS}", "parallel.dp=1 parallel.pp=2 training.precision=bf16"])
def test_an_evaluation_waits_at_its_end_alone(settings: str) -> None:
    config = config_of(settings)
    with stepping(config) as step, closing(none_waiting([fake_batch(config)] * 2)) as batches:
        with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
            evaluate(step.engine, step.losses, batches)
        assert not list(batches)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: torch.tensor(1.0, device=x.device),
        lambda x: torch.zeros(2).to(x.device),
        lambda x: torch.empty(x.shape).copy_(x, non_blocking=True),
        lambda _x: torch.cuda.synchronize(),
        lambda _x: torch.cuda.Event(enable_timing=True).synchronize(),
    ],
    ids="item bool cpu mask number upload download synchronize event".split(),
)
def test_a_wait_is_found_wherever_it_is(wait: Callable[[torch.Tensor], object]) -> None:
    config = config_of("parallel.dp=1 model.num_layers=1")
    with stepping(config) as step:
        for inject in (
            lambda output: wait(output),
            lambda output: output.register_hook(lambda gradient: (wait(gradient), None)[1]),  # in the backward pass
        ):
            layer = step.engine.parts[0].layers["0"]
            hook = layer.register_forward_hook(lambda _module, _inputs, output, inject=inject: (inject(output), None)[1])
            with pytest.raises(WAITS):
                train(config, step, 1)
            hook.remove()
