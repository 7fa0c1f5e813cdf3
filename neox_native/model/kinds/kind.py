"""What a layer kind tells of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn as nn

from neox_native.config.schema import Model
from neox_native.model.costs import Costs
from neox_native.model.parameters import Cards


@dataclass(frozen=True)
class Kind:
    """One kind of layer."""

    name: str
    """In `model.pattern`."""
    build: Callable[[Model], nn.Module]
    """Makes the module."""
    cards: Callable[[Model], Cards]
    """Each parameter's card, by its name in the module."""
    module: str
    """The module's name in a block, and so in checkpoints."""
    norm: str
    """The name, in the block, of the learned half of the norm before it."""
    costs: Callable[[Model], Costs] | None = None
    """None: the kind trains, but nobody predicts its memory and its speed."""
    dealt: Callable[[Model, int], Model] = lambda model, holders: model
    """From a model and a number of holders to the model that can be cut into that many even parts: the same one, unless some
    rows must be copied (see `RowGroups`)."""
    enclosed: bool = False
    """Whether its module only calls its first projections, those cut between rows, on what it reads, and returns what its
    `OutputLinear` gives: then a layout may compute them together with those of its neighbours. Each of its
    matrices has a cut, and one has cut 1."""
