"""Layer kinds by name. A kind is one file: a module that knows no rank, a card for each parameter, and its costs.

A module of a kind maps x̂ [B, T, D], normalised and scaled, and the `Context` to its branch [B, T, D]. Its last projection
is an `OutputLinear`, whose bias the block adds once after all branches are joined: the module's `output_bias`.
"""

from __future__ import annotations

from neox_native.config.schema import Model
from neox_native.errors import UserError
from neox_native.model.kinds.attention import ATTENTION
from neox_native.model.kinds.feed_forward import FEED_FORWARD
from neox_native.model.kinds.kind import Kind

KINDS: dict[str, Kind] = {kind.name: kind for kind in (ATTENTION, FEED_FORWARD)}


def kinds_of_layers(model: Model) -> list[tuple[Kind, ...]]:
    """The kinds of each layer of the whole model: `model.pattern`, repeated.

    Raises:
        UserError: the pattern names a kind that does not exist, or two of one layer that have the same name there.
    """
    entries = [entry.split("+") for entry in model.pattern]
    for entry, names in zip(model.pattern, entries):
        if unknown := [name for name in names if name not in KINDS]:
            raise UserError(f"model.pattern: {entry!r} names the layer kind {unknown[0]!r}; the known are {', '.join(KINDS)}.")
        if len({place for name in names for place in (KINDS[name].module, KINDS[name].norm)}) < 2 * len(names):
            raise UserError(
                f"model.pattern: {entry!r} names a kind twice in one layer, or two whose parameters would have the same names; "
                "make two layers of it."
            )
    layers = [tuple(KINDS[name] for name in names) for names in entries]
    return [layers[number % len(layers)] for number in range(model.num_layers)]


def kinds_of(model: Model) -> list[Kind]:
    """Each kind of the model once."""
    return list(dict.fromkeys(kind for layer in kinds_of_layers(model) for kind in layer))


def residual_steps(kinds: tuple[Kind, ...], model: Model) -> list[tuple[Kind, ...]]:
    """The residual steps of a layer of these kinds: one with all of them side by side, which is GPT-NeoX's parallel
    residual, or one for each."""
    return [kinds] if model.parallel_residual else [(kind,) for kind in kinds]


def dealt(model: Model, holders: int) -> Model:
    """The model that can be cut into so many even parts: `model`, unless one of its kinds has rows that must be copied."""
    for kind in kinds_of(model):
        model = kind.dealt(model, holders)
    return model
