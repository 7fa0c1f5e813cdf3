"""Before the first step: ranks that agree, a mesh that communicates, data to read, a folder to write to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import torch
import torch.distributed as dist

from neox_native.checkpoint.files import read_metadata
from neox_native.checkpoint.resume import Start, find_start
from neox_native.checkpoint.tokenizer_files import or_own, other_tokenizer, own_tokenizer
from neox_native.config.check import notices
from neox_native.config.schema import Config, Run
from neox_native.config.settings import SETTINGS
from neox_native.data.build import Datasets, Position, build_data, how_far
from neox_native.data.dataset import Dataset
from neox_native.data.loader import StepBatch, build_loader
from neox_native.durable import make_folder
from neox_native.engine.step import TrainStep
from neox_native.errors import UserError
from neox_native.launch import Launch, Ranks, start_process_group
from neox_native.mesh import Mesh, build_mesh
from neox_native.parallel.async_tp import share_memory
from neox_native.reliability.preemption import Requests
from neox_native.reliability.startup import check_agreement, check_axes, code_version, describe_mesh
from neox_native.reliability.watchdog import FLIGHT_RECORDER, Watchdog, enable_flight_recorder, job_store
from neox_native.train.folder import RunFolder, has_begun
from neox_native.train.keeping import Exports
from neox_native.train.out_of_memory import out_of_memory_explained
from neox_native.train.report import Report
from neox_native.train.state import RunState


@contextmanager
def joined_ranks(config: Config, device: torch.device, launch: Launch) -> Iterator[None]:
    """Join the other ranks for the body, and tell the user what the settings imply."""
    if device.type == "cuda":
        enable_flight_recorder(flight_recorder_folder(config))
    start_process_group(device, launch)
    if launch.rank == 0:
        for notice in notices(config, launch.world_size, device.type):
            print(notice)
    yield
    dist.destroy_process_group()  # not after an error: it would wait for ranks that may never come


@contextmanager
def watched(config: Config, device: torch.device, requests: Requests | None) -> Iterator[tuple[Watchdog, Requests]]:
    """This rank's watchdog, which sees to it that nothing in the body waits for ever, and requests to leave, heard from
    here on unless they are already. A body that runs out of memory ends with what is to be known of it."""
    own = Requests(Launch.from_environment()) if requests is None else None
    watchdog = Watchdog(config.run, dist.get_rank(), dist.get_world_size(), flight_recorder_folder(config), job_store())
    try:
        with out_of_memory_explained(config, device, watchdog):
            yield watchdog, own or requests
    finally:
        watchdog.close()
        if own is not None:
            own.close()


def lay_out_ranks(config: Config, device: torch.device) -> tuple[Mesh, Ranks, RunFolder]:
    """The mesh and the run's folder. Before they are used, all ranks have agreed on settings and code, and each axis has
    carried a collective.

    Raises:
        UserError: on all ranks, naming the rank and host that differs or does not answer.
    """
    choose_arithmetic(config.run, device)
    ranks = Ranks()
    facts = {name: str(setting.of(config)) for name, setting in SETTINGS.items()}
    hosts = check_agreement(facts | {"the code": code_version()}, ranks)
    folder = RunFolder(config, ranks)
    mesh = build_mesh(config.parallel, device)
    check_axes(mesh, hosts, job_store())
    if config.parallel.async_tp:
        with ranks.together("Sharing memory over tp"):
            share_memory(mesh.tensor, hosts)
    ranks.say(describe_mesh(mesh, hosts))
    return mesh, ranks, folder


def choose_start(config: Config, ranks: Ranks, folder: RunFolder, watchdog: Watchdog) -> tuple[Config, Start | None]:
    """The settings as they hold for this start, and the checkpoint to start from, if any."""
    watchdog.at(0, "find the start")
    config = after_restart(config, ranks)
    return config, find_start(config.checkpoint, folder.path / "checkpoints", ranks)


def after_restart(config: Config, ranks: Ranks) -> Config:
    """The settings as they hold for a restart by the launcher. A run that has begun goes on where it stood, whatever
    `checkpoint.resume` was; a named checkpoint stays the start until the run has saved one of its own."""
    launch = Launch.from_environment()
    counts, launchers = zip(*ranks.gather((launch.restarts, launch.launcher)))
    with ranks.together(f"Looking for the run in run.dir = {config.run.dir!r}"):
        begun = ranks.is_first and has_begun(config, max(counts) > 0, set(launchers) - {""})
    if not ranks.from_first(begun):
        return config
    return replace(config, checkpoint=replace(config.checkpoint, resume="auto"))


def choose_arithmetic(run: Run, device: torch.device) -> None:
    """Let kernels choose, or demand those that repeat bitwise, as `run.determinism` says. In elastic mode a CPU rank computes
    with one thread: its kernels cut sums by threads, and the threads of a rank change with the ranks of a machine.

    On a GPU, "fast" multiplies fp32 matrices in TF32, about seven times as fast, with 10 bits of mantissa. Products of 16 bits
    are never summed in 16 bits: that costs next to nothing and loses none of what fp32 accumulation is for.
    """
    repeats = run.determinism != "fast"
    if repeats:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
    torch.use_deterministic_algorithms(repeats)
    # Filling every new buffer would find reads of unset memory, not make anything repeat.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_float32_matmul_precision("high" if device.type == "cuda" and not repeats else "highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if run.determinism == "elastic" and device.type == "cpu":
        torch.set_num_threads(1)


def open_data(config: Config, ranks: Ranks, start: Start | None, watchdog: Watchdog) -> Datasets:
    """The run's data, the same on all ranks, in the order in which the checkpoint it goes on from was reading them."""
    watchdog.at(0, "open data")
    saved, own = {}, ""
    with ranks.together("Opening the data"):
        if start and ranks.is_first:
            saved = read_metadata(start.path)
            own = own_tokenizer(start.path, saved)
    saved, own = ranks.from_first((saved, own))
    goes_on = start is not None and not start.weights_only
    position = Position.of(saved if goes_on else {})
    settings = replace(config.data, tokenizer=or_own(config.data.tokenizer, own)) if goes_on else config.data
    data = build_data(settings, config.model, config.training, config.evaluation, config.run.seed, ranks, position)
    check_agreement({name: str(value) for name, value in data.train.fingerprint().items()}, ranks)
    if another := other_tokenizer(saved, config.data.tokenizer, data.tokenizer):
        if goes_on:
            raise UserError(f"{another}; set it back, or start another run with another run.dir.")
        ranks.say(f"{another}: ids mean other texts than the weights learnt")
    ranks.say(data.train.describe())
    if reach := how_far(data.train, config.training.global_batch_size, position):
        ranks.say(reach)
    watchdog.at(0, "build the model")
    return data


def nothing_to_do(config: Config, ranks: Ranks, folder: RunFolder, state: RunState, exports: Exports) -> bool:
    """Whether the run is complete, exports included: then this start changes nothing. A collective."""
    total_steps = config.training.steps
    if state.step < total_steps or exports.due(state.step, missing_only=True) or not folder.needs_nothing(config, state.step):
        return False
    ranks.say(f"nothing to do: step {state.step} of training.steps = {total_steps}; raise it to go on")
    return True


def batches_left(config: Config, mesh: Mesh, device: torch.device, data: Datasets, state: RunState) -> Iterator[StepBatch]:
    """The run's batches from here on. The first is read now: data that cannot be read is refused before anything is
    written. A collective."""
    with state.ranks.together("Reading the first batch"):
        steps = config.training.steps - state.step
        batches = batches_of(data.train, config, mesh, device, state.consumed_samples, steps)
        first = list(islice(batches, 1))
    return chain(first, batches)


def batches_of(
    data: Dataset, config: Config, mesh: Mesh, device: torch.device, consumed_samples: int, steps: int
) -> Iterator[StepBatch]:
    """This rank's rows of a dataset's batches, from a sample on."""
    return build_loader(
        data,
        consumed_samples=consumed_samples,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        dp_rank=mesh.rows.rank,
        dp_size=mesh.rows.size,
        stop_after_steps=steps,
        pin_memory=device.type == "cuda",
    )


def begin(config: Config, mesh: Mesh, folder: RunFolder, start: Start | None, state: RunState, step: TrainStep) -> Report:
    """Write down what starts, where and from what: from here on, the run's folder changes. A collective."""
    changed = folder.begin(config, state.step)
    if step.losses.device.type == "cuda":
        make_folder(flight_recorder_folder(config))  # for NCCL, on each machine
    report = Report(config, mesh, state.ranks, step, resumed_step=state.step)
    report.started(start, changed)
    return report


def flight_recorder_folder(config: Config) -> Path:
    """Where the last collectives of a run that hung are written."""
    return Path(config.run.dir) / FLIGHT_RECORDER
