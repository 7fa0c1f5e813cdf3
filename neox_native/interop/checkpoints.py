"""What every conversion needs: the names and shapes of a model, and checkpoints read and written a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox_native.checkpoint import files, store
from neox_native.checkpoint.safe import INDEX, read_index
from neox_native.config.described import described_model
from neox_native.config.schema import Model
from neox_native.errors import UserError
from neox_native.launch import Ranks
from neox_native.model.transformer import cards

Read = Callable[[str], Tensor]
"""Full tensor of a parameter, by its global name."""
PREFIX = "model."
"""Names of weights in a checkpoint are this and the parameter's global name."""


def parameter_shapes(model: Model) -> dict[str, torch.Size]:
    """Shape of every parameter of the whole model by global name, in the order of the forward pass."""
    return {name: torch.Size(card.shape) for name, card in cards(model).items()}


def model_of(metadata: Mapping[str, Any], path: Path) -> Model:
    """The [model] section under which a checkpoint was written. Raises `UserError` where it names none, or one that cannot
    be."""
    settings = metadata.get("model")
    if not isinstance(settings, dict):
        raise UserError(f"{path / files.METADATA} does not describe its model; it is not a checkpoint of this program.")
    return described_model(settings, path / files.METADATA)


def require_held(model: Model, path: Path, ranks: Ranks) -> None:
    """Raise `UserError` on all ranks where the checkpoint does not hold that model, before any memory is taken for it."""
    with ranks.together(f"Opening {path}"):
        index = read_index(path)
    state = {PREFIX + name: torch.empty(shape, device="meta") for name, shape in parameter_shapes(model).items()}
    store.check_fit(path, state, index, ranks, only=PREFIX, lenient=())


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest one of a run's folder.

    Raises `UserError` where there is none.
    """
    path = Path(path)
    if (path / INDEX).is_file() or (path / files.MANIFEST).is_file():
        return path
    for folder in (path / "checkpoints", path):
        found = files.finished(folder)
        if found:
            return found[0]
    raise UserError(
        f"{path} holds no checkpoint: give the folder of one (it has a {files.MANIFEST}), such as "
        "runs/quickstart/checkpoints/step_000000200, or the folder of a run."
    )


def require_new(folder: Path) -> None:
    """Raise `UserError` where converting into `folder` would overwrite something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; name a new folder or remove it.")


def unit_of(name: str) -> str:
    """What is read together: a layer ("layers.3."), or a single parameter outside the layers."""
    return ".".join(name.split(".")[:2]) + "." if name.startswith("layers.") else name


class CheckpointReader:
    """A verified checkpoint, read by this process alone: full tensors, fp32, on the CPU, one layer in memory at a time.

    Raises `UserError` where it is damaged or does not hold the model that it describes.
    """

    def __init__(self, path: Path):
        self.path, self._ranks = Path(path), Ranks()
        complaints = store.find_damage(self.path, self._ranks)
        if complaints:
            shown = "; ".join(complaints[: store.NAMES_SHOWN])
            raise UserError(f"The checkpoint {self.path} cannot be read: {shown}.")
        self.metadata = files.read_metadata(self.path)
        self.model = model_of(self.metadata, self.path)
        require_held(self.model, self.path, self._ranks)
        self.shapes = parameter_shapes(self.model)
        self._unit, self._tensors = "", dict[str, Tensor]()

    def __call__(self, name: str) -> Tensor:
        """The parameter of that global name."""
        if unit_of(name) != self._unit:
            self._unit, self._tensors = unit_of(name), {}  # the old ones go before the new ones come
            names = [each for each in self.shapes if unit_of(each) == self._unit]
            state = {PREFIX + each: torch.empty(self.shapes[each]) for each in names}
            store.load(self.path, state, self._ranks, only=PREFIX + self._unit, verified=True)
            self._tensors = {each: state[PREFIX + each] for each in names}
        return self._tensors[name]


class _ReadWhenAsked(Mapping[str, Tensor]):
    """State whose tensors are read when they are written, so that one at a time is in memory."""

    def __init__(self, read: Read, names: list[str]):
        self.read, self.names = read, names

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name.removeprefix(PREFIX)).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def write_checkpoint(path: Path, model: Model, read: Read, about: dict[str, Any], beside: Mapping[str, bytes] = {}) -> None:
    """Write weights alone as a checkpoint, by this process, with one tensor in memory at a time.

    Args:
        path: the checkpoint's folder, which must not exist.
        read: full tensor of a parameter's global name, any float type.
        about: more entries of `metadata.json`.
        beside: small files that it holds, by name.
    """
    state = {PREFIX + name: torch.empty(shape, device="meta") for name, shape in parameter_shapes(model).items()}
    metadata = {"step": 0, "consumed_samples": 0, "model": asdict(model), "torch": torch.__version__, **about}
    source = _ReadWhenAsked(read, list(state))
    doing = f"Writing the checkpoint {path}"
    store.write(Path(path), doing, state, metadata, Ranks(), source, file_per_tensor=True, beside=beside)
