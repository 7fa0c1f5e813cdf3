"""GPT-NeoX's own checkpoints (DeepSpeed), of any tensor-parallel degree, merged a tensor at a time.

Two layouts, where L is the number of layers and YY the tensor-parallel rank:

    layer_XX-model_YY-model_states.pt    one file per entry of the pipeline, e.g. the 20B "slim" weights
    mp_rank_YY_model_states.pt           all entries of a rank as "sequential.XX.NAME" under the key "module"

Entry 0 is the embedding, 2 .. L + 1 are the layers, L + 3 is the last norm and L + 4 the head.

[Note: replicated parameters] Each rank keeps its own copy of what is not cut. In the parallel-residual form GPT-NeoX
adds the biases of attention-out and MLP-out *before* the all-reduce, once per rank, so the bias that the model
effectively has is the sum over ranks. In the sequential form it adds them after the reduction. Norms may have drifted
apart by rounding; like GPT-NeoX's own tools, we average them.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neox_native.checkpoint.torch_files import look_at
from neox_native.config.schema import Model
from neox_native.errors import UserError
from neox_native.interop.checkpoints import parameter_shapes
from neox_native.plain_files import is_plain_name, read_text

LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
CUT_DIM = {
    "embed_in.weight": 0,
    "embed_out.weight": 0,
    "attention.query_key_value.weight": 0,
    "attention.query_key_value.bias": 0,
    "mlp.dense_h_to_4h.weight": 0,
    "mlp.dense_h_to_4h.bias": 0,
    "attention.dense.weight": 1,
    "mlp.dense_4h_to_h.weight": 1,
}
"""Dim along which GPT-NeoX cuts a parameter; the others are copied to every rank."""
ADDED_BY_EVERY_RANK = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")
NEWER_NAMES = {"mlp.dense_h_to_4h": "mlp.linear1", "mlp.dense_4h_to_h": "mlp.linear2"}
NUMPY_STATE = [
    (np._core.multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")
] + [np.ndarray, np.dtype, type(np.dtype(np.uint32))]  # fmt: skip
"""What GPT-NeoX's saved random state is made of: plain arrays."""


class NeoxReader:
    """A folder of GPT-NeoX's, read and merged one tensor at a time.

    Args:
        path: the folder of a step (`global_step150000`), or the folder above with the file `latest`.
        model: what the folder holds; nothing in it says.

    Raises:
        UserError: where files are missing or refused, or the folder holds another model.
    """

    def __init__(self, path: Path, model: Model):
        self.path, self.model = step_folder(path), model
        if model.gated or model.kv_heads != model.num_heads:
            raise UserError(
                f"model.activation = {model.activation!r} with model.num_kv_heads = {model.num_kv_heads}: GPT-NeoX "
                "orders the weights of gated layers and grouped queries by rank, which is not read; plain layers are."
            )
        self.shapes = parameter_shapes(model)
        self._files = self._find_files()
        self.tp = 1 + max(rank for _, rank in self._files)
        self._load = lru_cache(maxsize=2 * self.tp)(load_file)
        for name in self.shapes:
            self._shards(name)

    def __call__(self, name: str) -> Tensor:
        """The parameter of our global name, merged, fp32."""
        shards, local = [shard.float() for shard in self._shards(name)], within_layer(name)
        if local in CUT_DIM:
            whole = torch.cat(shards, dim=CUT_DIM[local])
        elif local in ADDED_BY_EVERY_RANK and self.model.parallel_residual:
            whole = torch.stack(shards).sum(0)
        else:
            whole = torch.stack(shards).mean(0)
        if name in ("embed_in.weight", "embed_out.weight"):
            whole = whole[: self.shapes[name][0]]
        return whole

    def vocabulary_rows(self) -> int:
        """Rows of the embedding, padding included."""
        return sum(len(shard) for shard in self._shards("embed_in.weight"))

    def _find_files(self) -> dict[tuple[int | None, int], Path]:
        """(pipeline entry or None, tensor-parallel rank) -> file. Every entry must have the same ranks from 0 on."""
        found: dict[tuple[int | None, int], Path] = {}
        for file in sorted(self.path.iterdir()):
            if match := LAYER_FILE.fullmatch(file.name):
                found[int(match[1]), int(match[2])] = file
        if not found:
            for file in sorted(self.path.iterdir()):
                if match := RANK_FILE.fullmatch(file.name):
                    found[None, int(match[1])] = file
        if not found:
            raise UserError(
                f"{self.path} has neither layer_XX-model_YY-model_states.pt nor mp_rank_YY_model_states.pt files: it "
                "is no checkpoint of GPT-NeoX."
            )
        tp = 1 + max(rank for _, rank in found)
        missing = [(entry, rank) for entry in {entry for entry, _ in found} for rank in range(tp) if (entry, rank) not in found]
        if missing:
            entry, rank = missing[0]
            what = f"mp_rank_{rank:02}" if entry is None else f"layer_{entry:02}-model_{rank:02}"
            raise UserError(f"{self.path} misses {what}_model_states.pt ({len(missing)} files in all) of tensor-parallel {tp}.")
        return found

    def _shards(self, name: str) -> list[Tensor]:
        """A parameter's tensor on every tensor-parallel rank, checked against the shape that the model wants."""
        entry, theirs = place_of(name, self.model.num_layers)
        shards = []
        for rank in range(self.tp):
            if (None, rank) in self._files:
                file, prefix = self._files[None, rank], f"sequential.{entry}."
                module = self._load(file).get("module")
                tensors = module if isinstance(module, dict) else {}
            elif (entry, rank) in self._files:
                file, prefix = self._files[entry, rank], ""
                tensors = self._load(file)
            else:
                raise UserError(
                    f"{self.path} has no layer_{entry:02}-model_{rank:02}-model_states.pt, where {name} of a model "
                    f"with model.num_layers = {self.model.num_layers} would be."
                )
            shard = next((tensors[prefix + each] for each in theirs if prefix + each in tensors), None)
            if shard is None:
                raise UserError(f"{file} has no {prefix}{theirs[0]}: it does not hold the model that was described.")
            if not isinstance(shard, Tensor) or not shard.is_floating_point():
                raise UserError(f"{file} is refused: what it calls {prefix}{theirs[0]} is no tensor of weights.")
            shards.append(shard)
        self._check_shape(name, shards)
        return shards

    def _check_shape(self, name: str, shards: list[Tensor]) -> None:
        dim, wanted = CUT_DIM.get(within_layer(name)), tuple(self.shapes[name])
        found = list(shards[0].shape)
        if dim is not None and all(dim < shard.dim() for shard in shards):
            found[dim] = sum(shard.shape[dim] for shard in shards)
        vocabulary = name in ("embed_in.weight", "embed_out.weight")
        alike = len(found) == len(wanted) and all(_without(dim, shard) == _without(dim, shards[0]) for shard in shards)
        fits = alike and found[1:] == list(wanted[1:]) and (found[0] >= wanted[0] if vocabulary else found[0] == wanted[0])
        if not fits:
            shapes = str(tuple(found)) if alike else " and ".join(sorted({str(tuple(shard.shape)) for shard in shards}))
            raise UserError(
                f"{self.path}: {name} has shape {shapes} over {self.tp} ranks, the model that was described has {wanted}"
                + (
                    "; describe a vocabulary of at most that many rows, with --vocab-size or in --config with "
                    "model.vocab_size and model.vocab_multiple_of."
                    if vocabulary
                    else "."
                )
            )


def _without(dim: int | None, shard: Tensor) -> list[int]:
    """A shape but for one dim."""
    return [size for each, size in enumerate(shard.shape) if each != dim]


def step_folder(path: Path) -> Path:
    """The folder that holds the weights: the one given, or the one that its file `latest` names."""
    path = Path(path)
    if (path / "latest").is_file():
        name = read_text(path / "latest").strip()
        if not is_plain_name(name):
            raise UserError(f"{path / 'latest'} is refused: it names {ascii(name):.100}, which is no folder beside it.")
        path = path / name
    if not path.is_dir():
        raise UserError(f"{path} is no folder.")
    return path


def within_layer(name: str) -> str:
    """A parameter's name without its layer."""
    return re.sub(r"^layers\.\d+\.", "", name)


def place_of(name: str, num_layers: int) -> tuple[int, list[str]]:
    """Where GPT-NeoX keeps our parameter: the entry of the pipeline, and the names that it has had there."""
    if match := re.match(r"layers\.(\d+)\.", name):
        local = within_layer(name)
        stem, _, kind = local.rpartition(".")
        names = [local, f"{NEWER_NAMES.get(stem, stem)}.{kind}"]
        return int(match[1]) + 2, names + ([f"{stem}.scale"] if "layernorm" in stem else [])
    if name.startswith("final_layer_norm."):
        kind = name.rpartition(".")[2]
        return num_layers + 3, [f"norm.{kind}"] + (["norm.scale"] if kind == "weight" else [])
    return {
        "embed_in.weight": (0, ["word_embeddings.weight"]),
        "embed_pos.weight": (0, ["position_embeddings.weight"]),
        "embed_out.weight": (num_layers + 4, ["final_linear.weight"]),
    }[name]


def load_file(file: Path) -> dict[str, Any]:
    """The dict that `torch.save` wrote, mapped into memory and read without running code. Raises `UserError` where it is
    refused."""
    try:
        with open(file, "rb") as opened:
            look_at(opened)
        with torch.serialization.safe_globals(NUMPY_STATE):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UserError as error:
        raise UserError(f"{file} is refused: {error}.") from None
    except OSError:
        raise
    except Exception as error:  # whatever torch says of a file that lies about its numbers
        raise UserError(f"{file} is damaged: {(str(error).splitlines() or [type(error).__name__])[0]}.") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{file} is refused: it holds no dict of tensors.")
    return loaded
