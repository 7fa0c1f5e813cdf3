"""How long a step takes: a roofline over matrix products, memory traffic and links. Pure arithmetic, [Note: letters].

[Note: roofline] A stage's time per microbatch is the sum of its matrix products and its attention at their share of the
peak, of its elementwise kernels at the memory's speed, and of its tensor-parallel collectives, which nothing overlaps unless
`parallel.async_tp` does: then `EXPOSED_WITH_OVERLAP` of them is left, as measured of others' code. The pipeline adds its
bubble; the traffic over dp hides behind the passes it can run beside; the update reads and writes the optimizer's state
once. A layer is never faster than its kernels can be launched.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

from neox_native.config.layout_rules import head_gradients_in_forward
from neox_native.config.schema import Config
from neox_native.dtypes import ELEMENT_BYTES, FP32_BYTES
from neox_native.model.flops import model_flops_per_token
from neox_native.model.costs import Costs
from neox_native.model.kinds import residual_steps
from neox_native.plan.costs import bubble_fraction, passes_of_layer, point_to_point_bytes, ring
from neox_native.plan.hardware import Gpu
from neox_native.plan.shares import (
    Kinds,
    Sort,
    activation_bytes,
    gradient_bytes,
    layer_costs,
    num_microbatches,
    share_of,
    stream_bytes,
)


@dataclass(frozen=True)
class Software:
    """What kernels a training code has."""

    fused: bool
    """Elementwise operations run together, in compiled blocks or in kernels written by hand."""
    overlaps_tensor_parallel: bool = False
    """Tensor-parallel collectives run beside matrix products."""
    overlaps_gathers: bool = True
    """In ZeRO's stages 1 and 2 parameters are gathered beside the next forward pass; DeepSpeed waits for them."""
    launch_seconds: float = 0.125e-3
    """Host time to launch the forward pass of one layer kind."""
    logit_bytes: float = 40.0
    """What the loss reads and writes of a logit, beside its products."""
    kernels: tuple[float, float] = (1.0, 2.0)
    """What elementwise kernels of a forward and of a backward pass move, in units of what layer kinds state."""
    slowdown: float = 1.0
    """Compute time over the roofline's, for what synchronises, copies and waits; from a calibration row of `published.toml`."""


EAGER = Software(fused=False, kernels=(41 / 38, 100 / 38))
"""Counted in a block of ours: 41 activations forward and 100 backward, where its kinds state 38; compiled 19 and 38."""
FUSED = Software(fused=True, logit_bytes=16.0, launch_seconds=0.05e-3)
COMPILED = replace(FUSED, logit_bytes=8.0)
"""Of ours: see [Note: compiled loss] in `model/compiled_loss.py`."""
NEOX = Software(fused=False, overlaps_gathers=False, slowdown=1.17)
OVERLAPPED = replace(FUSED, overlaps_tensor_parallel=True)
EXPOSED_WITH_OVERLAP = 0.3
"""Share of tensor-parallel collectives that stays exposed where they run beside pieces of the matrix products."""
CONVERTED_BYTES, SETTLED_BYTES = 36, 220
"""What eager kernels read and write in elastic mode to turn a gradient's element into an integer, beside adding it up; and
once a step, to turn a sum back and to add its square up in limbs."""
DTENSOR_SECONDS = 0.25e-3
"""More host time for the forward pass of one layer kind with tensor parallelism: some 25 DTensor operations of 10
microseconds each."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step and what they are spent on."""

    seconds: float
    forward: list[float]
    """Per microbatch, by pipeline rank; tensor-parallel collectives included."""
    backward: list[float]
    """Per microbatch, by pipeline rank; recomputation and tensor-parallel collectives included."""
    tensor_parallel: float
    """Exposed tensor-parallel collectives of the slowest rank in the step."""
    data_parallel: float
    """Exposed traffic over dp."""
    pipeline: float
    """Exposed sends between stages."""
    bubble_fraction: float
    update: float
    tokens_per_second_per_gpu: float
    mfu: float

    @property
    def exposed(self) -> float:
        """Communication that nothing hides."""
        return self.tensor_parallel + self.data_parallel + self.pipeline


@dataclass(frozen=True)
class Machine:
    """A cluster of equal nodes and the code that runs on it."""

    gpu: Gpu
    gpus_per_node: int = 8
    software: Software | None = None
    """None: this program, compiled or not as a config says."""

    def running(self, config: Config) -> Machine:
        """The machine with the code that trains a resolved config."""
        return replace(self, software=self.software or (COMPILED if config.compile.on else EAGER))

    def ring_bytes_per_second(self, ranks: int, stride: int) -> float:
        """The speed of a collective among `ranks` devices that lie `stride` apart: inside a node that of its links; across
        nodes that of the network cards of all the ranks that one node has."""
        inside = max(1, min(ranks, self.gpus_per_node // stride))
        links = self.gpu.node_bytes_per_second
        if inside < ranks:
            links = min(links, inside * self.gpu.network_bytes_per_second)
        return links * self.gpu.link_efficiency

    def seconds_of_memory(self, num_bytes: float) -> float:
        """The time to read or write so many bytes."""
        return num_bytes / (self.gpu.memory_bytes_per_second * self.gpu.memory_efficiency)

    def seconds_of_matmul(self, rows: float, inner: float, columns: float, element_bytes: int) -> float:
        """The time of a product [rows, inner] x [inner, columns]. Memory traffic is added: it makes small products slow."""
        flops = 2.0 * rows * inner * columns
        moved = element_bytes * (rows * inner + inner * columns + rows * columns)
        return flops / (self.gpu.peak_flops_per_second * self.gpu.matmul_efficiency) + self.seconds_of_memory(moved)


def step_time(config: Config, machine: Machine) -> StepTime:
    """Time of a step of a resolved config."""
    machine, parallel, m = machine.running(config), config.parallel, num_microbatches(config)
    stages = stage_passes(config, machine)
    ranks = [
        sum((stages[stage] for stage in share_of(config, rank).stages), Passes(0.0, 0.0, 0.0))
        for rank in range(parallel.pp)
    ]
    forward, backward = [passes.forward for passes in ranks], [passes.backward for passes in ranks]
    sends = [_sends(config, machine, rank) for rank in range(parallel.pp)]
    slowest = max(range(parallel.pp), key=lambda rank: forward[rank] + backward[rank] + sends[rank])
    bubble = bubble_fraction(parallel, m)
    mean = sum(forward + backward) / parallel.pp
    compute = m * (forward[slowest] + backward[slowest] + sends[slowest]) + bubble * m * mean
    exposed = max(_exposed_data_parallel(config, machine, rank, forward[rank], backward[rank]) for rank in range(parallel.pp))
    update = max(_update(config, machine, rank) for rank in range(parallel.pp))
    seconds = compute + exposed + update
    tokens = config.training.global_batch_size * config.model.seq_length / (parallel.pp * parallel.dp * parallel.tp)
    flops = model_flops_per_token(config.model) * tokens
    return StepTime(
        seconds=seconds,
        forward=forward,
        backward=backward,
        tensor_parallel=m * ranks[slowest].collectives,
        data_parallel=exposed,
        pipeline=m * sends[slowest],
        bubble_fraction=bubble,
        update=update,
        tokens_per_second_per_gpu=tokens / seconds,
        mfu=flops / seconds / machine.gpu.peak_flops_per_second,
    )


@dataclass(frozen=True)
class Passes:
    """Seconds that one microbatch takes."""

    forward: float
    backward: float
    """Recomputation included."""
    collectives: float
    """Exposed tensor-parallel collectives, which both include."""

    def __add__(self, other: Passes) -> Passes:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
        return Passes(*(mine + theirs for mine, theirs in pairs))

    def __mul__(self, times: int) -> Passes:
        return Passes(*(value * times for value in dataclasses.astuple(self)))


def stage_passes(config: Config, machine: Machine) -> list[Passes]:
    """The passes of each stage of the pipeline, first to last."""
    machine, parallel, stages = machine.running(config), config.parallel, dict[int, Passes]()
    layer = cache(lambda sort: _layer(config, sort, machine))
    for rank in range(parallel.pp):
        share = share_of(config, rank)
        for stage, layers in zip(share.stages, share.sorts(config.training)):
            counts = Counter(layers).items()
            stages[stage] = sum((layer(sort) * times for sort, times in counts), Passes(0.0, 0.0, 0.0))
    last = parallel.pp * parallel.virtual_stages - 1
    head = machine.software.slowdown * _head(config, machine)
    stages[last] += Passes(head / 3, 2 * head / 3, 0.0)
    return [stages[stage] for stage in range(last + 1)]


def _layer(config: Config, sort: Sort, machine: Machine) -> Passes:
    """The passes of a layer: its kinds' projections as a tensor-parallel rank multiplies them, their other operations at the
    speed of attention, and its elementwise kernels, which are all that selective recomputation repeats."""
    (kinds, forgets), t, software = sort, config.parallel.tp, machine.software
    tokens, e = _tokens(config), ELEMENT_BYTES[config.training.precision]
    costs = layer_costs(config.model, kinds, t)
    shapes = [product.held(t) for each in costs for product in each.products]
    products = sum(machine.seconds_of_matmul(tokens, inner, columns, e) for inner, columns in shapes)
    flops = tokens * sum(each.flops for each in costs) / t
    others = flops / (machine.gpu.peak_flops_per_second * machine.gpu.attention_efficiency)
    moved = machine.seconds_of_memory(_kernel_bytes(config, kinds, costs, software.fused))
    kernels, backward_kernels = (share * moved for share in software.kernels)
    launch = len(kinds) * (software.launch_seconds + (DTENSOR_SECONDS if t > 1 and not software.fused else 0.0))
    forward = software.slowdown * max(products + others + kernels, launch)
    backward = software.slowdown * max(2 * products + 2.5 * others + backward_kernels, 1.5 * launch)
    cheap = software.slowdown * (kernels if software.fused else max(kernels, launch))
    again = {"none": 0.0, "selective": cheap, "full": forward}[forgets]
    collectives = 0.0
    if t > 1:
        passes = passes_of_layer(config, sort)
        sent, calls = passes * ring(activation_bytes(config), t), passes / (1 if config.parallel.sequence_parallel else 2)
        collectives = sent / machine.ring_bytes_per_second(t, 1) + calls * machine.gpu.collective_seconds
        overlaps = software.overlaps_tensor_parallel or config.parallel.async_tp
        collectives *= EXPOSED_WITH_OVERLAP if overlaps else 1.0
    early = collectives / (3 if forgets == "full" else 2)
    return Passes(forward + early, backward + again + collectives - early, collectives)


def _tokens(config: Config) -> int:
    return config.training.micro_batch_size * config.model.seq_length


def _kernel_bytes(config: Config, kinds: Kinds, costs: list[Costs], fused: bool) -> float:
    """What the elementwise kernels of a layer's forward pass read and write: activations, for every residual step and for
    every kind in it (norm, affine part, sum and bias), half of them as sequence parallelism may cut them; and what the kinds
    state, divided by t."""
    steps = len(residual_steps(kinds, config.model))
    residual = (7.0 if fused else 16.0) * (0.3 * steps + 0.35 * len(kinds))
    touched = sum(each.touched if fused else each.touched_eager for each in costs)
    inside = _tokens(config) * touched * ELEMENT_BYTES[config.training.precision] / config.parallel.tp
    return residual * (stream_bytes(config) + activation_bytes(config)) / 2 + inside


def _head(config: Config, machine: Machine) -> float:
    """The time of final norm, head and loss, forward and backward. All slices of the loss but the first add to an fp32 gradient."""
    model, t = config.model, config.parallel.tp
    columns, e = model.padded_vocab_size / t, ELEMENT_BYTES[config.training.precision]
    product = machine.seconds_of_matmul(_tokens(config), model.hidden_size, columns, e)
    added = (_tokens(config) - 1) // config.training.loss_slice_tokens * model.hidden_size * (2 * FP32_BYTES + 2 * e)
    products = 3 if head_gradients_in_forward(config.parallel) else 4
    return products * product + machine.seconds_of_memory((machine.software.logit_bytes * _tokens(config) + added) * columns)


def _sends(config: Config, machine: Machine, pp_rank: int) -> float:
    """The time to send to neighbouring stages, per microbatch; nothing hides it."""
    parallel = config.parallel
    if parallel.pp == 1:
        return 0.0
    stride = parallel.dp * parallel.tp
    inside = stride * parallel.pp <= machine.gpus_per_node
    link = machine.gpu.node_bytes_per_second if inside else machine.gpu.network_bytes_per_second
    sent = point_to_point_bytes(config, pp_rank) / num_microbatches(config)
    return sent / (link * machine.gpu.link_efficiency) + 2 * parallel.virtual_stages * machine.gpu.collective_seconds


def _exposed_data_parallel(config: Config, machine: Machine, pp_rank: int, forward: float, backward: float) -> float:
    """The time of traffic over dp beyond the passes that hide it. Reductions run beside the last backward pass (stages 2 and
    3: every one), but for the last unit's; gathers beside the first forward pass (stage 3: both passes of every
    microbatch). Once a step gradients are summed over the ranks that hold the same shards: in stage 0 all of dp, otherwise
    none unless ZeRO shards inside groups, whose collectives then have the links of so many neighbours."""
    parallel, m = config.parallel, num_microbatches(config)
    if parallel.dp == 1:
        return 0.0
    stage, e, g = parallel.zero_stage, ELEMENT_BYTES[config.training.precision], gradient_bytes(config)
    share, shards = share_of(config, pp_rank), parallel.shard_ranks
    replicas, first = parallel.dp // shards, share.units[0]

    def ring(num_bytes: float, ranks: int, stride: int, units: int = len(share.units)) -> float:
        sent, speed = num_bytes * (ranks - 1) / ranks, machine.ring_bytes_per_second(ranks, stride)
        return sent / speed + units * machine.gpu.collective_seconds if ranks > 1 else 0.0

    reduce, gather = (ring(each * share.world * share.row, shards, parallel.tp) for each in (g, e))
    across = ring(2 * g * share.row, replicas, parallel.tp * shards)
    tail = ring(g * first.world * first.size, shards, parallel.tp, units=0)
    last_tail = tail + ring(2 * g * first.size, replicas, parallel.tp * shards, units=0)
    busy = reduce + (gather if stage == 3 else 0.0)
    reductions = m if stage >= 2 else 1
    reduced = (reductions - 1) * max(busy - backward, tail) + max(busy + across - backward, last_tail)
    if stage == 3:
        return reduced + m * max(gather - forward, 0.0)
    return reduced + max(gather - (forward if machine.software.overlaps_gathers else 0.0), 0.0)


def _update(config: Config, machine: Machine, pp_rank: int) -> float:
    """The time in which the optimizer reads and writes master and two moments in fp32 and reads the gradient, and in which
    every microbatch's gradients are added up."""
    e, g, m = ELEMENT_BYTES[config.training.precision], gradient_bytes(config), num_microbatches(config)
    share = share_of(config, pp_rank)
    added, updated = m * (2 * g + 2 * e) * share.parameters, 7 * FP32_BYTES * share.row + 2 * e * share.parameters
    if config.run.determinism == "elastic":
        added, updated = added + m * CONVERTED_BYTES * share.parameters, updated + SETTLED_BYTES * share.row
    return machine.seconds_of_memory(updated + added)
