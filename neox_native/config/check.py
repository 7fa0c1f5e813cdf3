"""What cannot work is refused before it starts, with the numbers and a way out; what is slow says so."""

from __future__ import annotations

import dataclasses

from neox_native.config import layout_rules, rules
from neox_native.config.schema import Compile, Config
from neox_native.config.settings import SETTINGS, Setting, settings_of
from neox_native.config.values import to_toml
from neox_native.errors import UserError

RULES = (
    rules.heads,
    rules.pattern,
    rules.positions,
    rules.datasets,
    rules.learning_rate,
    rules.optimizer_shape,
    rules.loss_scale,
    rules.recomputation,
    rules.saving,
    rules.profiled,
    rules.repeatable,
)
LAYOUT_RULES = (
    layout_rules.mesh,
    layout_rules.batch,
    layout_rules.tensor_parallel,
    layout_rules.stages,
    layout_rules.schedule_microbatches,
    layout_rules.shard_groups,
    layout_rules.zero_bubble,
    layout_rules.async_tensor_parallel,
)

# A resumed run may change everything but what its weights, its optimizer state and the order of its data are made of:
# the model, the data, and these two.
FIXED_ELSEWHERE = ("run.seed", "optimizer.name")
# Exceptions within model and data. The initialisation is past; a corpus may move, and the loader compares its content.
FREE_WITHIN = (
    "model.hidden_dropout",
    "model.attention_dropout",
    "model.init",
    "model.output_init",
    "model.init_std",
    "data.train",
    "data.valid",
    "data.cache_dir",
)
# What weights that start another run can learn to live with.
LEARNED_AGAIN = ("model.rotary_base", "model.norm_eps")


def problems(config: Config, world_size: int) -> list[str]:
    """A sentence for each thing that cannot work on world_size ranks; none where all is well.

    Where a number is out of its own range, only that is said: the rules across settings would speak about nonsense.
    """
    if found := list(rules.out_of_range(config)):
        return found
    resolved = _resolved(config, world_size)
    return _faults(config) + [sentence for rule in LAYOUT_RULES for sentence in rule(resolved, world_size)]


def _faults(config: Config) -> list[str]:
    return [sentence for rule in RULES for sentence in rule(config)]


def require_some_layout(config: Config) -> None:
    """Refuse what no layout can mend, where the layout is still to be found.

    Raises:
        UserError: the message holds all sentences.
    """
    if found := list(rules.out_of_range(config)) or _faults(config):
        raise UserError("\n".join(found))


def _resolved(config: Config, world_size: int) -> Config:
    """The config with parallel.dp resolved where the mesh fits, and without what the mesh ignores."""
    parallel = config.parallel
    degree = layout_rules.degree_left(parallel, world_size) or parallel.dp
    return dataclasses.replace(config, parallel=layout_rules.in_use(dataclasses.replace(parallel, dp=degree)))


def require(config: Config, world_size: int) -> Config:
    """The config as a run on world_size ranks uses it: parallel.dp resolved, and what the mesh ignores (sequence
    parallelism at tp 1, say) at its default, so that nothing behind this call sees it.

    Raises:
        UserError: it cannot work; the message holds all sentences.
    """
    if found := problems(config, world_size):
        raise UserError("\n".join(found))
    return _resolved(config, world_size)


def require_on(device_type: str, config: Config) -> None:
    """Refuse what the device cannot do, which is known only where training runs.

    Raises:
        UserError: compilation in low precision on a CPU; tensor parallelism that overlaps where nothing can.
    """
    precision = config.training.precision
    if device_type == "cpu" and config.compile.on and precision != "fp32":
        raise UserError(
            f'compile.enabled = true with training.precision = "{precision}" needs a GPU: for a CPU, torch 2.11 to 2.13 '
            'write C++ that does not compile; set compile.enabled = false or training.precision = "fp32".'
        )
    if config.parallel.async_tp and device_type == "cpu":
        raise UserError(
            f"parallel.async_tp = true with parallel.tp = {config.parallel.tp} needs GPUs, which send while they multiply: on a CPU "
            "there is nothing to overlap; set parallel.async_tp = false."
        )
    if config.parallel.async_tp and not on_device(config, device_type).compile.on:
        raise UserError(
            'parallel.async_tp = true is done by torch\'s compiler, and compile.enabled = "auto" compiles nothing: '
            f"{_obstacles(config, _num_ranks(config))[0]} Or set parallel.async_tp = false."
        )


def on_device(config: Config, device_type: str) -> Config:
    """The config as it is used on a kind of device, with compile.enabled = "auto" resolved; it has passed `require`."""
    if config.compile.enabled != "auto":
        return config
    return dataclasses.replace(config, compile=Compile(device_type != "cpu" and not _obstacles(config, _num_ranks(config))))


def _num_ranks(config: Config) -> int:
    return config.parallel.pp * config.parallel.dp * config.parallel.tp


def _obstacles(config: Config, world_size: int) -> list[str]:
    """Why a config that can work cannot be compiled, a sentence each."""
    return problems(dataclasses.replace(config, compile=Compile(True)), world_size)


def notices(config: Config, world_size: int, device_type: str) -> list[str]:
    """A sentence for each thing that works but is slow, with its number, and for what an "auto" does not do. The config must
    have passed `require`.

    Sources: CPU rates measured with one thread; volumes of ZeRO from Rajbhandari et al. 2020 section 7, per step and
    times (d - 1) / d for d data-parallel ranks, with gradients reduced once per microbatch.
    """
    found = []
    if config.compile.enabled == "auto" and device_type != "cpu" and (obstacles := _obstacles(config, world_size)):
        found.append(f'compile.enabled = "auto" compiles nothing: {obstacles[0]}')
    if config.training.precision == "fp16" and device_type == "cpu":
        found.append(
            'training.precision = "fp16" on a CPU multiplies matrices at about 1 GFLOP/s per thread, where '
            "fp32 reaches 90 and bf16 400; it is good for tests of the loss scale alone."
        )
    parallel = _resolved(config, world_size).parallel
    stage, count = parallel.zero_stage, config.training.num_microbatches(parallel.dp)
    if stage >= 2 and count > 1:
        volume = count + 1 if stage == 2 else 3 * count
        upto = "up to " if stage == 3 else ""
        where = f"inside groups of {parallel.zero_shard_size} ranks" if parallel.zero_shard_size else "over the dp axis"
        found.append(
            f"parallel.zero_stage = {stage} with {count} microbatches per step moves {upto}{volume} times the "
            f"parameters per step {where}, where stage 1 moves 2 times."
        )
    if config.run.determinism == "elastic" and device_type == "cpu":
        found.append(
            'run.determinism = "elastic" computes with 1 thread a rank on a CPU, whose kernels cut sums by threads: start a rank per core.'
        )
    if config.model.drops:
        found.append(
            "Dropout masks are drawn for a microbatch and a tensor-parallel rank: with model.hidden_dropout or "
            "model.attention_dropout above 0, another training.micro_batch_size, parallel.tp, parallel.sequence_parallel or "
            "compile.enabled trains another, equally random, run; with tp and without sequence parallelism the heads of "
            "different ranks drop the same attention weights."
        )
    return found


def incompatible(trained: Config, new: Config) -> list[str]:
    """A sentence for each setting whose change makes it wrong to resume with `new` a checkpoint trained with `trained`.

    Layout, precision, batch size, steps, learning rate, logging and saving may change.
    """
    fixed = [
        setting
        for dotted, setting in SETTINGS.items()
        if setting.section in ("model", "data") and dotted not in FREE_WITHIN or dotted in FIXED_ELSEWHERE
    ]
    return _differences(fixed, trained, new)


def other_model(trained: Config, new: Config) -> list[str]:
    """A sentence for each setting that makes weights trained with `trained` mean something else in `new`.

    Names and shapes are the checkpoint's to compare; the context, the vocabulary and what is `LEARNED_AGAIN` may differ.
    """
    free = (*FREE_WITHIN, *LEARNED_AGAIN, "model.seq_length", "model.vocab_size", "model.vocab_multiple_of")
    return _differences([each for each in settings_of("model") if each.dotted not in free], trained, new)


def kept_rows(trained: Config, new: Config) -> int:
    """Rows of the trained embedding and head that a model with a vocabulary at least as large takes over. Where it has more
    ids, the padding above the old ones is left behind: training has made it improbable."""
    old = trained.model
    return old.vocab_size if new.model.vocab_size > old.vocab_size else old.padded_vocab_size


def adaptations(trained: Config, new: Config) -> list[str]:
    """A sentence for each thing that a run which starts from weights trained with `trained` must learn anew."""
    found = [
        f"{setting.dotted} is {to_toml(setting.of(new))}, where the weights were trained with {to_toml(setting.of(trained))}; "
        "the first steps' loss may be higher."
        for setting in map(SETTINGS.__getitem__, LEARNED_AGAIN)
        if setting.of(trained) != setting.of(new)
    ]
    first, rows = kept_rows(trained, new), new.model.padded_vocab_size
    if first < rows:
        found.append(
            f"model.vocab_size is {new.model.vocab_size}, where the weights were trained with {trained.model.vocab_size}: rows "
            f"{first} to {rows - 1} of the embedding and the head are a new model's, drawn from run.seed and their names."
        )
    return found


def _differences(settings: list[Setting], trained: Config, new: Config) -> list[str]:
    return [
        f"{setting.dotted} is {to_toml(setting.of(new))}, but the checkpoint was trained with "
        f"{to_toml(setting.of(trained))}; set it back, or start another run with another run.dir."
        for setting in settings
        if setting.of(trained) != setting.of(new)
    ]
