"""Two checkpoints, tensor by tensor, each by the hash that the checkpoint tells; one without hashes is read for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from neox_native.checkpoint import files, store
from neox_native.checkpoint.safe import read_index
from neox_native.errors import UserError
from neox_native.hashes import as_text, tensor_hash
from neox_native.interop.checkpoints import PREFIX, model_of, parameter_shapes
from neox_native.launch import Ranks

RANDOM = "rng."
"""Names of what earlier versions saved for each rank of a layout; it is not compared."""


@dataclass(frozen=True)
class StateDifference:
    """The first tensor, in the order of the model, in which two checkpoints differ."""

    name: str
    what: str
    """A sentence's end: "differs in 3 of 40 elements, by 1e-07 at most"."""
    num_differing: int
    """Tensors that differ, this one included."""
    num_tensors: int
    elements: int | None = None
    """How many of its elements differ; None where shapes or types do."""
    largest: float | None = None
    """Largest difference of an element; None, too, where one is not finite."""

    def __str__(self) -> str:
        return f"{self.name} {self.what}; {self.num_differing:,} of {self.num_tensors:,} tensors differ"

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


class SavedState:
    """A checkpoint that this process reads alone. Raises `UserError` where it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path, self.index, self.metadata = path, read_index(path), files.read_metadata(path)
        self.entries = {
            name: entry
            for name, entry in self.index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(RANDOM)
        }

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Of each tensor: as told, or of the numbers, all of which are read for it."""
        told = files.read_hashes(self.path)
        if told is not None:
            return told
        if complaints := store.find_damage(self.path, Ranks()):
            raise UserError(f"The checkpoint {self.path} is damaged: " + "; ".join(complaints[: store.NAMES_SHOWN]) + ".")
        return {name: as_text(int(tensor_hash(store.read_alone(self.path, name, self.index)))) for name in self.entries}

    def signature(self, name: str) -> tuple[Any, ...] | None:
        """What is equal if a tensor is: shape, type and hash; None where there is no such tensor."""
        entry = self.entries.get(name)
        return None if entry is None else (tuple(entry.size), entry.properties.dtype, self.hashes.get(name))

    def read(self, name: str) -> Tensor:
        """A whole tensor, checked against its hash."""
        tensor = store.read_alone(self.path, name, self.index)
        if as_text(int(tensor_hash(tensor))) != self.hashes.get(name):
            raise UserError(f"The checkpoint {self.path} is damaged: {name} is not what {files.HASHES} tells.")
        return tensor

    def in_order(self, names: Sequence[str]) -> list[str]:
        """Weights as the forward pass meets them, then the optimizer's state in the same order, then the rest."""
        parameters = {name: number for number, name in enumerate(parameter_shapes(model_of(self.metadata, self.path)))}

        def place(name: str) -> tuple[int, str, int, str]:
            if name.startswith(PREFIX):
                return 0, "", parameters.get(name.removeprefix(PREFIX), len(parameters)), name
            kind, _, of = name.removeprefix("optimizer.").partition(".")
            return (1 if name.startswith("optimizer.") else 2), kind, parameters.get(of, len(parameters)), name

        return sorted(names, key=place)


def compare(first: Path, second: Path) -> StateDifference | None:
    """What two checkpoints differ in first, or None."""
    mine, other = SavedState(first), SavedState(second)
    names = mine.in_order(list(mine.entries.keys() | other.entries.keys()))
    differing = [name for name in names if mine.signature(name) != other.signature(name)]
    if not differing:
        return None
    counts, name = (len(differing), len(names)), differing[0]
    alone = [state.path for state in (mine, other) if name in state.entries]
    if len(alone) == 1:
        return StateDifference(name, f"is in {alone[0]} alone", *counts)
    (*described, _), (*otherwise, _) = mine.signature(name) or (), other.signature(name) or ()
    if described != otherwise:
        told = [f"{str(dtype).removeprefix('torch.')} {list(shape)}" for shape, dtype in (described, otherwise)]
        return StateDifference(name, f"is {told[0]} | {told[1]}", *counts)
    return _elements(name, mine.read(name), other.read(name), counts)


def _elements(name: str, first: Tensor, second: Tensor, counts: tuple[int, int]) -> StateDifference:
    """How two tensors of one shape and type differ."""
    total = first.numel()
    bits = [tensor.reshape(-1).view(torch.uint8).view(total, -1) for tensor in (first, second)]
    elements = int((bits[0] != bits[1]).any(1).sum())
    largest = float((first.double() - second.double()).abs().max())
    by = f"by {largest:.3g} at most" if largest < float("inf") else "and not all of it is finite"
    what = f"differs in {elements:,} of {total:,} elements, {by}"
    return StateDifference(name, what, *counts, elements, largest if largest < float("inf") else None)
