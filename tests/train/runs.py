"""A few optimizer steps of a config on any mesh, and what one process makes of the same."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch.distributed.tensor import Shard

from neox_native.config.check import require
from neox_native.config.schema import Compile, Config, Model, Optimizer, Parallel, Run, Training
from neox_native.data.loader import StepBatch
from neox_native.data.order import rows_of_rank
from neox_native.engine.build import build_engine, build_model, build_step
from neox_native.launch import Launch, pick_device
from neox_native.mesh import build_mesh
from neox_native.parallel.async_tp import share_memory
from neox_native.train.evaluate import evaluate
from neox_native.train.start import choose_arithmetic
from tests.ranks import run_ranks

STEPS = 3
CPU = torch.device("cpu")
MODEL = Model(num_layers=4, hidden_size=32, num_heads=4, seq_length=16, vocab_size=60, vocab_multiple_of=16)
MODELS = {
    "parallel": MODEL,
    "sequential": replace(MODEL, parallel_residual=False),
    "tied": replace(MODEL, tie_embeddings=True),
    "grouped odd tied": replace(MODEL, num_kv_heads=2, vocab_size=61, vocab_multiple_of=1, tie_embeddings=True),
    "one key head": replace(MODEL, num_kv_heads=1, activation="swiglu", norm="rmsnorm", attention_bias=False),
    "dropping": replace(MODEL, hidden_dropout=0.2, attention_dropout=0.2),
    "odd": replace(MODEL, vocab_size=61, vocab_multiple_of=1),
    "odd tied": replace(MODEL, vocab_size=61, vocab_multiple_of=1, tie_embeddings=True),
}
# A key's bias shifts all scores of a query alike, so its gradient is rounding noise around zero, which Adam would blow up to
# steps of the full rate: eps keeps it small.
OPTIMIZERS = {
    "sgd": Optimizer(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": Optimizer(lr=1e-3, eps=1e-6),
}


def config_of(
    parallel: Parallel, model: str = "parallel", optimizer: str = "sgd", compiled: bool = False, run: Run = Run(device="cpu"), **training
) -> Config:
    """A checked config with 8 sequences a step."""
    settings = Training(**{"global_batch_size": 8, "micro_batch_size": 1, "loss_slice_tokens": 6, "clip_grad_norm": 1.0, "steps": STEPS, **training})
    config = Config(
        model=MODELS[model], training=settings, parallel=parallel, optimizer=OPTIMIZERS[optimizer], compile=Compile(compiled), run=run
    )
    return require(config, parallel.pp * parallel.dp * parallel.tp)


def batch(config: Config, step: int, dp_rank: int, masked: bool) -> StepBatch:
    """This data rank's share of the step's random batch; with `masked`, a ragged part of the targets does not count."""
    model, training = config.model, config.training
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, model.vocab_size, (training.global_batch_size, model.seq_length + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    if masked:
        for row in range(training.global_batch_size):
            targets[row, : 2 * row] = -100
    rows = torch.as_tensor(rows_of_rank(training.global_batch_size, training.micro_batch_size, dp_rank, config.parallel.dp))
    fields = {"tokens_BT": inputs[rows], "targets_BT": targets[rows]}
    return StepBatch(fields, {}, (step + 1) * training.global_batch_size, 0, int((targets[rows] >= 0).sum()))


@dataclass
class Shards:
    """One rank's part of every parameter it holds: (place, tp dim or None, tensor) by name."""

    place: tuple[int, int, int]
    of: dict[str, tuple[int | None, torch.Tensor]] = field(default_factory=dict)
    shared: dict[str, tuple[range, range]] = field(default_factory=dict)
    """Of parameters whose rows overlap over tp: the rows of the whole that this rank has."""


@dataclass
class Outcome:
    """What a run on one rank showed."""

    losses: list[float]
    norms: list[float]
    evaluation: float
    gradients: Shards
    weights: Shards


def shards(optimizer, place: tuple[int, int, int], what: str) -> Shards:
    """This rank's "gradient" or "shard" (fp32 master) of each parameter."""
    found = Shards(place)
    for trained in optimizer.trained:
        placement = trained.spec.placement
        dim = placement.dim if isinstance(placement, Shard) else None
        found.of[trained.spec.name] = dim, getattr(trained, what).to(CPU, copy=True)
        if trained.spec.shared is not None:
            found.shared[trained.spec.name] = trained.spec.shared.own, trained.spec.shared.copied
    return found


def train(config: Config, masked: bool = False) -> Outcome:
    """Run `STEPS` steps on this rank."""
    torch.manual_seed(0)
    device = pick_device(config.run.device, Launch.from_environment())
    if device.type == "cuda":
        choose_arithmetic(config.run, device)
    mesh = build_mesh(config.parallel, device)
    if config.parallel.async_tp and device.type == "cuda":
        share_memory(mesh.tensor, ["here"] * mesh.whole.size())
    place = tuple(mesh.place.values())
    parts, optimizer = build_model(config, mesh, device)
    engine = build_engine(config, mesh, device, parts, optimizer)
    step = build_step(config, mesh, device, engine, optimizer)
    gradients: list[Shards] = []
    update = optimizer._update

    def noting(*arguments):
        if not gradients:
            gradients.append(shards(optimizer, place, "gradient"))
        update(*arguments)

    optimizer._update = noting
    found, norms = [], []
    for number in range(STEPS):
        result = step(batch(config, number, place[1], masked), config.optimizer.lr)
        found.append(step.losses.total(result.loss).item())
        norms.append(result.grad_norm.item())
    evaluation = evaluate(engine, step.losses, [batch(config, 50, place[1], masked)])
    return Outcome(found, norms, evaluation, gradients[0], shards(optimizer, place, "shard"))


def whole(parts: list[Shards], shard_ranks: int = 1, exact: bool = False) -> dict[str, torch.Tensor]:
    """Full tensors from all ranks' parts, each sharded among `shard_ranks` neighbours on dp, whose replicas must be equal bit by
    bit. Stages that share one must agree on it, to rounding or `exact`."""
    full: dict[str, torch.Tensor] = {}
    for name in sorted({name for part in parts for name in part.of}):
        columns: dict[int, dict[tuple[int, int], torch.Tensor]] = {}
        rows: dict[int, tuple[range, range]] = {}
        for part in parts:
            if name in part.of:
                columns.setdefault(part.place[0], {})[part.place[1:]] = part.of[name][1]
                dim = part.of[name][0]
                if name in part.shared:
                    rows[part.place[2]] = part.shared[name]
        candidates = [_join(pieces, dim, shard_ranks) for pieces in columns.values()]
        candidates = [_without_copies(candidate, rows) if rows else candidate for candidate in candidates]
        tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"atol": 1e-6}
        assert all(torch.allclose(candidates[0], other, **tolerance) for other in candidates), f"{name} differs between stages"
        full[name] = candidates[0]
    return full


def _join(pieces: dict[tuple[int, int], torch.Tensor], dim: int | None, shard_ranks: int) -> torch.Tensor:
    ranks = sorted(pieces)
    by_tp = []
    for tp in sorted({tp for _, tp in ranks}):
        rows = [pieces[place] for place in ranks if place[1] == tp]
        first, *others = (torch.cat(rows[start : start + shard_ranks]) for start in range(0, len(rows), shard_ranks))
        assert all(torch.equal(first, other) for other in others), "replicas differ"
        by_tp.append(first)
    return by_tp[0] if dim is None else torch.cat(by_tp, dim)


def _without_copies(joined: torch.Tensor, rows: dict[int, tuple[range, range]]) -> torch.Tensor:
    """The whole tensor from the tp ranks' parts one after the other, whose copies of rows must be equal bit by bit."""
    places = torch.cat([torch.arange(each.start, each.stop) for tp in sorted(rows) for each in rows[tp]])
    full = torch.full((int(places.max()) + 1, *joined.shape[1:]), float("nan"))
    full[places] = joined
    assert torch.equal(full[places], joined) and not full.isnan().any()
    return full


@cache
def serial(model: str, optimizer: str, masked: bool, micro_batch_size: int = 8, compiled: bool = False) -> list[Outcome]:
    """The twin: one process, one microbatch a step unless told otherwise."""
    config = config_of(Parallel(dp=1), model, optimizer, compiled, micro_batch_size=micro_batch_size)
    return run_ranks(1, train, config, masked)


def compare(
    parallel: Parallel,
    model: str = "parallel",
    optimizer: str = "sgd",
    masked: bool = False,
    compiled: bool = False,
    twin: Config | None = None,
    run: Run = Run(device="cpu"),
    relative: float = 1e-5,
    **training,
) -> None:
    """Assert that a layout's losses, gradient norms, evaluation, first gradients and last weights are its twin's to `relative`:
    one process on a CPU, unless `twin` says otherwise. Where masks are drawn, it draws them as the layout does."""
    config = config_of(parallel, model, optimizer, compiled, run, **training)
    drawn = (config.training.micro_batch_size, compiled) if config.model.hidden_dropout else ()
    outcomes = run_ranks(parallel.pp * parallel.dp * parallel.tp, train, config, masked, device=run.device)
    expected = run_ranks(len(outcomes), train, twin, masked, device=twin.run.device) if twin else serial(model, optimizer, masked, *drawn)
    for outcome in outcomes:
        close(outcome.losses, expected[0].losses, relative)
        close(outcome.norms, expected[0].norms, relative)
        close([outcome.evaluation], [expected[0].evaluation], relative)
    gradients = whole([outcome.gradients for outcome in outcomes], parallel.shard_ranks)
    weights = whole([outcome.weights for outcome in outcomes], parallel.shard_ranks)
    expected_weights = whole([outcome.weights for outcome in expected])
    for name, gradient in whole([outcome.gradients for outcome in expected]).items():
        assert (gradients[name] - gradient).abs().max() <= relative * gradient.abs().max(), name
        assert (weights[name] - expected_weights[name]).abs().max() <= relative * (0.1 if optimizer == "sgd" else 5), name
    assert sorted(gradients) == sorted(weights) == sorted(expected_weights)


def close(found: list[float], expected: list[float], relative: float = 1e-5) -> None:
    """Assert that two lists of numbers agree."""
    for mine, theirs in zip(found, expected, strict=True):
        assert abs(mine - theirs) <= relative * abs(theirs), (found, expected)
