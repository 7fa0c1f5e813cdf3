"""Closed forms: parameters of a model and the floating-point operations of training it. Pure arithmetic."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from neox_native.config.schema import Model
from neox_native.model.block import block_cards
from neox_native.model.kinds import Kind, kinds_of_layers
from neox_native.model.parameters import Cards
from neox_native.model.readout import readout_cards
from neox_native.model.transformer import cards


def elements(of: Cards) -> int:
    """Elements of these parameters."""
    return sum(card.num_elements for card in of.values())


def total_parameters(model: Model) -> int:
    """Parameters of the whole model; 2 V h + L (12 h^2 + 13 h) + 2 h for GPT-NeoX's own."""
    return elements(cards(model))


@cache
def model_flops_of_layer(model: Model, kinds: tuple[Kind, ...], causal: bool = False) -> int:
    """Forward and backward operations per token of a layer: 6 for each parameter, and what its kinds do beside: 12 h s for
    attention, or the causal half of it."""
    costs = [kind.costs(model) for kind in kinds if kind.costs]
    beside = sum(3 * each.flops if causal else each.model_flops for each in costs)
    return 6 * elements(block_cards(model, kinds)) + beside


@cache
def model_flops_of_readout(model: Model) -> int:
    """Forward and backward operations per token of the final norm and the head, which multiplies even where it is tied."""
    return 6 * elements(readout_cards(replace(model, tie_embeddings=False)))


def model_flops_per_token(model: Model, causal: bool = False) -> int:
    """Forward and backward operations per token [FLOP]: 6 (N - N_lookup) + 12 L h s. Rows that are only looked up, those of
    embeddings, are not multiplied.

    Attention counts every pair of positions, not the causal half, and recomputation is left out, as in PaLM's
    appendix B (Chowdhery et al. 2022): that keeps MFU comparable with published numbers. With `causal` only the pairs count
    that are computed, 6 L h s, as newer numbers of Megatron-LM do.
    """
    return sum(model_flops_of_layer(model, kinds, causal) for kinds in kinds_of_layers(model)) + model_flops_of_readout(model)


def flops_of_layer(model: Model, kinds: tuple[Kind, ...]) -> int:
    """Forward and backward operations per token that a layer runs: three products with every matrix, and three times what
    its kinds' forward passes do beside. Where a kind does not state its costs, its matrices alone count."""
    total = 0
    for kind in kinds:
        if kind.costs:
            costs = kind.costs(model)
            total += 3 * (2 * costs.multiply_adds + costs.flops)
        else:
            total += 6 * sum(card.num_elements for card in kind.cards(model).values() if card.role == "matrix")
    return total
