"""What a checkpoint of a run holds, and whether one fits this run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate

from neox_native.checkpoint import files, store
from neox_native.config.check import adaptations, incompatible, kept_rows, other_model
from neox_native.config.described import described_config
from neox_native.config.layout_rules import in_use
from neox_native.config.schema import Config
from neox_native.config.settings import SETTINGS
from neox_native.data.dataset import check_fingerprint
from neox_native.engine.spikes import SpikeGuard
from neox_native.errors import UserError
from neox_native.interop.checkpoints import PREFIX
from neox_native.launch import Ranks
from neox_native.mesh import Mesh
from neox_native.metrics.throughput import device_name
from neox_native.model.initialize import seed_of
from neox_native.optim.loss_scale import LossScale
from neox_native.zero.layout import ZeroStage
from neox_native.zero.optimizer import ShardedOptimizer
from neox_native.zero.state import first_rows
from neox_native.zero.spec import local


VOCABULARY = ("model.embed_in.weight", "model.embed_out.weight")
"""What has a row for each token id."""


def seed_dropout(config: Config, mesh: Mesh, step: int) -> None:
    """Seed this rank's random stream, which only dropout draws from, for one step.

    The masks of a step depend on the seed, the step and the rank's place, not on the steps before: a resume has no random
    state to restore, and ranks that drop alike still do so in another layout. Ranks of one tp group hold the same residual
    stream, so they must drop the same elements; with sequence parallelism they hold different tokens, so they must not.
    """
    tp = mesh.tensor.rank if config.parallel.sequence_parallel else 0
    torch.manual_seed(seed_of(config.run.seed, f"dropout.{step}.{mesh.pipeline.rank}.{mesh.rows.rank}.{tp}"))


OPTIONAL = ("loss_scale.", "spike_guard.", "rng.")
"""Names that other settings may lack; they then keep their first values. Random states are left by earlier versions."""


def run_state(
    optimizer: ShardedOptimizer, loss_scale: LossScale | None, spike_guard: SpikeGuard | None
) -> dict[str, Tensor]:
    """Everything that changes while a run trains, under global names: weights, optimizer state, loss scale, the spike
    guard's window."""
    state = dict(optimizer.state_dict())
    if loss_scale:
        state |= {f"loss_scale.{name}": value for name, value in loss_scale.state_dict().items()}
    if spike_guard:
        state[f"spike_guard.{spike_guard.window}"] = spike_guard.state
    return state


def copies(
    config: Config, mesh: Mesh, optimizer: ShardedOptimizer
) -> Iterator[tuple[str, dist.ProcessGroup, list[tuple[str, Tensor]]]]:
    """What several ranks hold alike, by mesh axis: over dp weights, over tp replicated ones and the random state that drops
    the same elements of the same residual stream, over neighbours in tp shared heads, over pp the embedding of the first and
    the last stage where it is tied.

    Stages 1 and 2 copy trained weights anew from their one owner in every step, so that over dp only frozen ones can drift
    apart; in stage 3 each has one owner.
    """
    shards: dict[str, tuple[dist.ProcessGroup, list[tuple[str, Tensor]]]] = {}
    for unit in optimizer.units:
        _, alike = shards.setdefault(unit.group.group_name, (unit.group, []))
        if unit.stage == ZeroStage.NONE:
            alike += [(spec.name, shard) for spec, shard in zip(unit.specs, unit.shards)]
        elif unit.stage != ZeroStage.PARAMETERS:
            alike += [(spec.name, local(spec.parameter)) for spec in unit.specs if not spec.parameter.requires_grad]
    for group, alike in shards.values():
        yield mesh.shards().name, group, alike
    specs, tp_group = optimizer.specs(), mesh.tensor.group
    state = optimizer.state_dict()
    masters = {spec.name: state[f"model.{spec.name}"].to_local() for spec in specs}
    replicated = [(spec.name, masters[spec.name]) for spec in specs if isinstance(spec.placement, Replicate)]
    if not config.parallel.sequence_parallel:
        on_gpu = optimizer.device.type == "cuda"
        replicated.append(("the random state", torch.cuda.get_rng_state(optimizer.device) if on_gpu else torch.get_rng_state()))
    yield mesh.tensor.name, tp_group, replicated
    for spec in specs:
        if spec.shared is not None:
            own, _ = state[f"model.{spec.name}"].ranges
            yield mesh.tensor.name, spec.shared.group, [(spec.name, masters[spec.name][len(own) :])]
        for group in spec.sum_over:
            if group.group_name != tp_group.group_name:
                yield mesh.pipeline.name, group, [(spec.name, masters[spec.name])]


def runtime_of(device: torch.device, ranks: Ranks) -> dict[str, str]:
    """What decides how numbers are rounded, besides the settings: torch, and the kinds of device of all ranks. A CPU's
    instructions and threads cut its sums."""
    name = device_name(device)
    if device.type == "cpu":
        name = f"cpu ({torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()})"
    return {"torch": str(torch.__version__), "device": " + ".join(sorted(set(ranks.gather(name))))}


def metadata(
    config: Config, step: int, consumed_samples: int, fingerprint: dict[str, Any], runtime: dict[str, str]
) -> dict[str, Any]:
    """What a checkpoint says about itself; `runtime` is `runtime_of` its ranks."""
    return {
        "step": step,
        "consumed_samples": consumed_samples,
        "data": fingerprint,
        "model": asdict(config.model),
        "config": asdict(config),
        "layout": {name: getattr(config.parallel, name) for name in LAYOUT},
        **runtime,
    }


def load_weights(path: Path, state: store.State, config: Config, ranks: Ranks) -> list[str]:
    """Fill the weights of `state` from a verified checkpoint of the same model, whose vocabulary may be smaller; returns a
    sentence for each thing that the run must learn anew. A collective.

    Rows of the embedding and the head that the checkpoint does not have keep their values.
    Raises `UserError` on all ranks where the checkpoint is of another model.
    """
    with ranks.together(f"Opening {path}"):
        trained = config_of(files.read_metadata(path))
    if found := other_model(trained, config):
        raise UserError(" ".join(found))
    rows, kept = trained.model.padded_vocab_size, kept_rows(trained, config)
    grows = kept < config.model.padded_vocab_size
    weights = {
        name: first_rows(value, kept, rows) if grows and name in VOCABULARY else value
        for name, value in state.items()
        if name.startswith(PREFIX)
    }
    store.load(path, weights, ranks, only=PREFIX, verified=True)
    return adaptations(trained, config)


def check_fits(
    saved: dict[str, Any], config: Config, fingerprint: dict[str, Any], runtime: dict[str, str], tokenizer_sha256: str = ""
) -> None:
    """Raise `UserError` where resuming from a checkpoint would not continue its run, in bitwise mode also where it would
    continue it but for rounding or for the elements that dropout drops."""
    kinds = {"step": int, "consumed_samples": int, "data": dict, "layout": dict}
    lacking = [name for name, kind in kinds.items() if type(saved.get(name)) is not kind or (kind is int and saved[name] < 0)]
    if lacking:
        raise UserError(
            f"The checkpoint's metadata.json does not tell {', '.join(lacking)}, which a run needs to go on; take its weights "
            "alone with checkpoint.initialize_from."
        )
    trained = config_of(saved)
    if tokenizer_sha256 and saved.get("tokenizer_sha256") == tokenizer_sha256:  # the same one under another name
        trained = replace(trained, data=replace(trained.data, tokenizer=config.data.tokenizer))
    if found := incompatible(trained, config):
        raise UserError(" ".join(found))
    check_fingerprint(saved["data"], fingerprint, "training")
    if config.run.determinism == "bitwise" and (found := _rounded_otherwise(saved, config, runtime)):
        raise UserError(
            f'run.determinism = "bitwise", but the run was changed since the checkpoint of step {saved["step"]}: {", ".join(found)}; '
            'numbers would agree to rounding only. Go on as it was, or set run.determinism = "fast".'
        )


LAYOUT = ("pp", "dp", "tp", "zero_stage")
"""Of [parallel], what a checkpoint tells beside its config, which the oldest ones do not have."""
ROUNDING = ("training.micro_batch_size", "training.precision", "compile.enabled")
"""With all of [parallel], the settings that cut sums or draw masks in another way and are not meant to change what is
trained. Recomputation is none of them: it repeats the same operations."""


def _rounded_otherwise(saved: dict[str, Any], config: Config, runtime: dict[str, str]) -> list[str]:
    """What of a checkpoint's layout, other `ROUNDING` settings and runtime is not this run's, as far as it tells."""
    layout = {name: value for name, value in saved["layout"].items() if name in LAYOUT and isinstance(value, int)}
    trained = config_of(saved)
    # Earlier versions wrote settings that a mesh ignores as the user gave them.
    trained = replace(trained, parallel=in_use(replace(trained.parallel, **layout)))
    told = [
        setting
        for dotted, setting in SETTINGS.items()
        if setting.section == "parallel" or dotted in ROUNDING
        if "config" in saved or setting.name in layout
    ]
    changed = {setting.dotted: (setting.of(trained), setting.of(config)) for setting in told}
    changed |= {name: (saved.get(name, here), here) for name, here in runtime.items()}
    return [f"{name} was {was} and is now {now}" for name, (was, now) in changed.items() if was != now]


def config_of(saved: dict[str, Any]) -> Config:
    """The settings that a checkpoint was trained with, as far as it tells; settings that it does not know have their defaults.

    Raises `UserError` where it tells none.
    """
    told = saved.get("config", {"model": saved.get("model")})
    if not isinstance(told, dict) or not isinstance(told.get("model"), dict):
        raise UserError("The checkpoint's metadata.json does not describe its model; it is not a checkpoint of this program.")
    return described_config(told, "The checkpoint's metadata.json")
