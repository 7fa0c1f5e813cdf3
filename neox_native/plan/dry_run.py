"""One training step of one rank of any mesh, in one process, on fake tensors: what it will need and what it will send.

Everything that runs is the training code: config, mesh, assembly, optimizer, engine, step. Only the ground is fake: a
process group whose collectives return at once, and tensors that have a shape but no content.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from neox_native.config.check import on_device, require
from neox_native.config.layout_rules import IN_ROUNDS
from neox_native.config.schema import Compile, Config
from neox_native.data.loader import StepBatch
from neox_native.engine.build import build_engine, build_optimizer, build_step, units_of
from neox_native.engine.single_stage import Engine
from neox_native.engine.step import TrainStep
from neox_native.fixed_point import PIECES
from neox_native.mesh import Mesh, build_mesh
from neox_native.model.transformer import Transformer
from neox_native.parallel.assemble import assemble
from neox_native.parallel.pipeline import Pipeline
from neox_native.parallel.timeline import timeline
from neox_native.plan import costs
from neox_native.plan.ledger import GRADIENTS, OPTIMIZER, PARAMETERS, Ledger, Mark, Peak, Totals, Traffic
from neox_native.plan.memory import memory
from neox_native.plan.shares import num_microbatches, states_costs
from neox_native.units import share_of_step, size
from neox_native.zero.optimizer import ShardedOptimizer
from neox_native.zero.spec import local

CPU = torch.device("cpu")


@dataclass(frozen=True)
class RankReport:
    """What one step is to one rank."""

    rank: int
    coordinates: dict[str, int]
    """Its place on each axis of the mesh."""
    parameters: int
    """Elements of the parameters that its part of the model has, before ZeRO shards them."""
    bytes_by_kind: dict[str, int]
    """What the peak consists of, by `ledger.KINDS`."""
    peak_bytes: int
    """Most memory at once."""
    peak_at: str
    """When in the step."""
    communication: dict[str, dict[str, int]]
    """Axis -> {"bytes", "collectives"} of a step, as `ledger.Traffic` counts them."""
    point_to_point_bytes: int
    """Sent to neighbouring stages in a step."""
    model_flops: int
    """Operations of this rank's layers and tokens as MFU counts them, recomputation left out."""
    hardware_flops: int
    """Operations of every matrix product and attention that ran."""
    bubble_fraction: float
    """Idle time of the pipeline over its compute time."""
    compiled: bool = False
    """Whether the run compiles: eager code ran, and the closed form says by how much its memory differs from compiled code's."""


def dry_run(config: Config, rank: int, world_size: int, exact: bool = False) -> RankReport:
    """The report of rank `rank` of `world_size`.

    After the warmup of the pipeline one microbatch is like the next. So with many microbatches two short steps run, and
    what they counted is continued to the whole step: sums, and the memory that each kind of work needs at most, are a
    constant plus so much per microbatch. The peak is the largest of these, and need not be that of a short step:
    looped_bfs holds more with every microbatch in a forward pass, and not at all in the update.

    Args:
        exact: run all microbatches whatever their number.

    Raises:
        UserError: the config cannot work on so many ranks.
    """
    asked = require(config, world_size)
    config = dataclasses.replace(asked, compile=Compile(False))  # a compiled block hides its operations
    total = num_microbatches(config)
    fewer, more = _enough(config)
    with fake_process_group(rank, world_size):
        mesh = build_mesh(config.parallel, CPU)
        _run(_shallow(config), mesh)
        if exact or total <= more:
            return _report(asked, mesh, _run(config, mesh))
        short = [_run(_with_microbatches(config, count), mesh) for count in (fewer, more)]
        return _report(asked, mesh, _continued(*short, total - fewer, more - fewer))


def distinct_ranks(config: Config, world_size: int) -> list[int]:
    """One rank of the first pipeline stage, of the second, of the last, and of the one that needs most memory by the
    closed form, where there is one."""
    config = require(config, world_size)
    parallel, stages = config.parallel, range(config.parallel.pp)
    most = max(stages, key=lambda stage: sum(memory(config, stage).values())) if states_costs(config.model) else 0
    return [stage * parallel.dp * parallel.tp for stage in sorted({0, min(1, stages[-1]), most, stages[-1]})]


def report_of(config: Config, started: int) -> str:
    """The distinct ranks of a config's own mesh, for people; where dp is left open, of as many as were started."""
    parallel = config.parallel
    world_size = parallel.pp * parallel.dp * parallel.tp if parallel.dp > 0 else started
    config = on_device(require(config, world_size), "cpu" if config.run.device == "cpu" else "cuda")
    return text([dry_run(config, rank, world_size) for rank in distinct_ranks(config, world_size)])


def text(reports: list[RankReport]) -> str:
    """Reports for people, and which rank needs most."""
    blocks = []
    for report in reports:
        place = " ".join(f"{axis} {number}" for axis, number in report.coordinates.items())
        lines = [f"rank {report.rank} ({place}): {report.parameters:,} parameters"]
        lines.append(f"  peak memory         {size(report.peak_bytes)}, {report.peak_at}")
        lines += [f"    {kind:17} {size(number)}" for kind, number in report.bytes_by_kind.items()]
        for axis, sent in report.communication.items():
            lines.append(f"  sent over {axis:9} {size(sent['bytes'])} in {sent['collectives']} collectives a step")
        lines.append(f"  sent to neighbours  {size(report.point_to_point_bytes)} a step")
        lines.append(f"  FLOPs of a step     {report.model_flops:.3e} of the model, {report.hardware_flops:.3e} executed")
        lines.append(f"  pipeline bubble     {share_of_step(report.bubble_fraction):.1%} of the step")
        blocks.append("\n".join(lines))
    if any(report.compiled for report in reports):
        blocks.append("Eager code was run; by how much the memory of compiled code differs is taken from the closed form.")
    worst = max(reports, key=lambda report: report.peak_bytes)
    return "\n\n".join(blocks) + f"\n\nworst: rank {worst.rank} with {size(worst.peak_bytes)}"


def _enough(config: Config) -> tuple[int, int]:
    """Two numbers of microbatches beyond the warmup, on the way to the whole step's. Rounds are the whole step's; see
    [Note: turns] in `plan/flight.py`."""
    pp, total = config.parallel.pp, num_microbatches(config)
    if pp > 1 and config.parallel.pipeline_schedule in IN_ROUNDS:
        of_a_round = total // max(1, total // pp)
        return 3 * of_a_round, 4 * of_a_round
    if pp > 1 and config.parallel.pipeline_schedule == "zbv":
        return 2 * pp, 2 * pp + 1
    return pp + 1, pp + 2


def _with_microbatches(config: Config, count: int) -> Config:
    training = config.training
    size = count * training.micro_batch_size * config.parallel.dp
    return dataclasses.replace(config, training=dataclasses.replace(training, global_batch_size=size))


def _continued(first: Any, second: Any, distance: int, step: int) -> Any:
    """The line through two values that lie `step` apart, at `distance` from the first; of what has parts, part by
    part."""
    if isinstance(second, dict):
        return {name: _continued(first[name], value, distance, step) for name, value in second.items() if name in first}
    if dataclasses.is_dataclass(second):
        return type(second)(**_continued(vars(first), vars(second), distance, step))
    return first + (second - first) * distance // step if isinstance(second, int) else second


def _shallow(config: Config) -> Config:
    """One layer per stage. DTensor asks once for every operation and layout what becomes of it, by running it on fake
    tensors of the full size, which look like ours; a step of this asks all there is to ask."""
    parallel = dataclasses.replace(config.parallel, stage_layers=[])
    model = dataclasses.replace(config.model, num_layers=parallel.pp * parallel.virtual_stages)
    count = min(num_microbatches(config), _enough(config)[0])
    return _with_microbatches(dataclasses.replace(config, model=model, parallel=parallel), count)


@dataclass(frozen=True)
class _Counted:
    """What the ledger noted of a step."""

    parameters: int
    peaks: dict[Hashable, Peak]
    totals: Totals


def _run(config: Config, mesh: Mesh) -> _Counted:
    """One step of all the microbatches that the config asks for."""
    ledger = Ledger(axes_of(mesh))
    with fake_step(config, mesh, CPU) as step:
        run_step(step, step.engine.parts.values(), fake_batch(config), ledger)
    parameters = sum(local(spec.parameter).numel() for spec in step.optimizer.specs())
    return _Counted(parameters, ledger.peaks(), ledger.totals)


@contextmanager
def fake_step(config: Config, mesh: Mesh, device: torch.device) -> Iterator[TrainStep]:
    """What this rank of a `fake_process_group` trains with, on `device`, which need not exist: tensors of the body are fake."""
    parts = assemble(config.model, config.parallel, config.training, config.compile, mesh)
    units = units_of(parts, config.model, config.parallel, mesh)
    with _fake_tensors():
        optimizer = build_optimizer(config, mesh, device, parts, units)
        if optimizer.fixed is not None:
            optimizer.fixed.piece = PIECES["cuda"]  # fewer operations to follow
        engine = build_engine(config, mesh, device, parts, optimizer)
        if isinstance(engine, Pipeline):
            _skip_the_vote(engine)
        yield build_step(config, mesh, device, engine, optimizer)


def run_step(step: TrainStep, parts: Iterable[Transformer], batch: StepBatch, ledger: Ledger) -> None:
    """One step under the ledger, real or fake; parameters are stale, as all steps but a run's first find them."""
    optimizer, engine = step.optimizer, step.engine
    _claim(optimizer, parts, ledger)
    _mark(engine, optimizer, parts, ledger)
    with ledger:
        optimizer.after_load()
        ledger.totals = Totals()
        step(batch, 1e-4)


def _claim(optimizer: ShardedOptimizer, parts: Iterable[Transformer], ledger: Ledger) -> None:
    """Book what exists between steps. Stages 2 and 3 of ZeRO resize some of it. Ranks that share a head are of the tp axis."""
    ledger.axes = {each.shared.group.group_name: "tp" for each in optimizer.specs() if each.shared} | dict(ledger.axes)
    for unit in optimizer.units:
        ledger.claim(unit.storages, PARAMETERS, resizable=unit.releases)
        ledger.claim([unit.gradients.row], GRADIENTS, resizable=not unit.gradients.keeps_matrix)
        # In fp32, stage 3's row of parameters is its own master.
        ledger.claim([unit.row] if unit.row is not None else [], OPTIMIZER if unit.master is None else PARAMETERS)
        ledger.claim([unit.master] if unit.master is not None else [], OPTIMIZER)
    for state in optimizer.optimizer.state.values():
        ledger.claim([value for value in state.values() if isinstance(value, Tensor)], OPTIMIZER)
    for part in parts:
        ledger.claim(part.buffers(), PARAMETERS)


def _mark(engine: Engine, optimizer: ShardedOptimizer, parts: Iterable[Transformer], ledger: Ledger) -> None:
    """Let the ledger know where in the step it is."""
    now = 0

    def at(index: int) -> None:
        nonlocal now
        now = index
        ledger.mark(Mark("backward", now))  # unless a forward follows

    engine.timing.on_microbatch = at
    after = "after the forward" if isinstance(engine, Pipeline) else "loss and backward"
    for part in parts:
        part.register_forward_pre_hook(lambda _module, _inputs: ledger.mark(Mark("forward", now)))
        part.register_forward_hook(lambda _module, _inputs, _output: ledger.mark(Mark(after, now)))
        if part.readout is not None:
            part.readout.cross_entropy.register_forward_pre_hook(lambda _module, _inputs: ledger.mark(Mark(after, now)))
    optimizer.optimizer.register_step_pre_hook(lambda *_: ledger.mark(Mark("update")))


def fake_batch(config: Config) -> StepBatch:
    """One data rank's share of a step."""
    training, data = config.training, config.data
    shape = (num_microbatches(config), training.micro_batch_size, config.model.seq_length)
    asked = {"documents_BT": data.document_attention, "positions_BT": data.document_positions}
    names = ["tokens_BT", "targets_BT", *(name for name, is_asked in asked.items() if is_asked)]
    fields = {name: torch.zeros(shape, dtype=torch.int64) for name in names}
    return StepBatch(fields, {}, training.global_batch_size, 0, fields["targets_BT"].numel())


def axes_of(mesh: Mesh) -> dict[str, str]:
    """Names of the process groups of this rank -> axis of the mesh, or "world"."""
    return {dist.group.WORLD.group_name: "world"} | {axis.group.group_name: name for name, axis in mesh.named.items()}


def _report(config: Config, mesh: Mesh, counted: _Counted) -> RankReport:
    peak, totals = max(counted.peaks.values(), key=lambda peak: peak.num_bytes), counted.totals
    place, parallel = mesh.place, config.parallel
    drawn = timeline(parallel.pipeline_schedule, parallel.pp, parallel.virtual_stages, num_microbatches(config))
    axes = dict.fromkeys((*mesh.named, "world"), Traffic()) | totals.traffic
    bytes_by_kind = peak.by_kind
    if config.compile.on and states_costs(config.model):
        eager = memory(dataclasses.replace(config, compile=Compile(False)), place["pp"])
        bytes_by_kind = {kind: peak.by_kind[kind] + number - eager[kind] for kind, number in memory(config, place["pp"]).items()}
    return RankReport(
        rank=dist.get_rank(),
        coordinates=place,
        parameters=counted.parameters,
        bytes_by_kind=bytes_by_kind,
        peak_bytes=sum(bytes_by_kind.values()),
        peak_at=str(peak.at),
        communication={axis: dataclasses.asdict(traffic) for axis, traffic in axes.items()},
        point_to_point_bytes=totals.sent_bytes,
        model_flops=costs.model_flops_of_rank(config, place["pp"]),
        hardware_flops=totals.flops,
        bubble_fraction=drawn.bubble_fraction,
        compiled=config.compile.on,
    )


@contextmanager
def fake_process_group(rank: int, world_size: int) -> Iterator[None]:
    """Be rank `rank` among `world_size` that do not exist: collectives return at once and leave tensors as they are."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _clear_sharding_prop_cache()  # what it remembers of an equal mesh names groups that are gone
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # nor may whoever trains in this process find ours


def _fake_tensors() -> FakeTensorMode:
    """A mode in which tensors have no content. It forgets which real tensor a fake one stands for: what it would
    remember weakly cannot be swapped into a parameter."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.fake_tensor_converter.set_tensor_memo = lambda tensor, fake: None
    return mode


def _skip_the_vote(engine: Pipeline) -> None:
    """torch's schedules first ask all stages whether they know their shapes. Ours do, and nobody would answer."""
    if not hasattr(engine.schedule, "_warmup_p2p"):
        return
    from torch.distributed.pipelining._utils import InferenceMode

    def agree(stages: list[Any], *_: Any) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    engine.schedule._warmup_p2p = agree
