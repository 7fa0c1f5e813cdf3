"""Hugging Face `GPTNeoXForCausalLM` folders, read and written a shard at a time.

    config.json, model-00001-of-00003.safetensors, ..., model.safetensors.index.json, tokenizer.json

Parameters have our names behind the prefix `gpt_neox.`, but for the head, which is `embed_out.weight` (`lm_head.weight`
in some releases).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from neox_native.checkpoint import files
from neox_native.checkpoint.store import new_folder
from neox_native.checkpoint.tokenizer_files import tokenizer_files
from neox_native.config.schema import Model
from neox_native.dtypes import STORED_AS
from neox_native.errors import UserError
from neox_native.interop import checkpoints
from neox_native.interop.hugging_face_config import OURS, from_config, table, to_config
from neox_native.launch import Ranks
from neox_native.plain_files import is_plain_name, read_json

HEAD_NAMES = ("embed_out.weight", "lm_head.weight")
BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
"""Constants that old releases stored among the weights."""
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 * 10**9


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(
            "Hugging Face folders need the package safetensors, an optional extra: pip install -e '.[hf]'."
        ) from None
    return safetensors


def hugging_face_name(name: str) -> str:
    """Their name of our parameter."""
    return name if name == "embed_out.weight" else f"gpt_neox.{name}"


class HuggingFaceReader:
    """A Hugging Face folder, read one tensor at a time.

    Raises `UserError` where it is of another architecture, or misses shards or tensors.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.config = read_json(self.path / "config.json", missing=f"{self.path} is no Hugging Face folder")
        self.model = from_config(self.config, self.path / "config.json")
        self.shapes = checkpoints.parameter_shapes(self.model)
        self._open = _safetensors().safe_open
        self._shard_of = self._find_tensors()
        self._check_shapes()

    def __call__(self, name: str) -> Tensor:
        """The parameter of our global name, in the type in which it is stored."""
        theirs, shard = self._shard_of[name]
        with self._open(shard, framework="pt") as file:
            return file.get_tensor(theirs)

    @property
    def tokenizer(self) -> str:
        """What `data.tokenizer` would say: what was kept at the export, else the folder, else ""."""
        has_file = (self.path / "tokenizer.json").is_file()
        kept = table(self.config, OURS, self.path).get("tokenizer")
        return kept if isinstance(kept, str) else str(self.path.resolve()) if has_file else ""

    def _find_tensors(self) -> dict[str, tuple[str, Path]]:
        """Our name -> their name and the shard that holds it."""
        index = self.path / INDEX
        if index.is_file():
            shards = table(read_json(index), "weight_map", index)
            if elsewhere := [shard for shard in shards.values() if not is_plain_name(shard)]:
                raise UserError(f"{index} is refused: it names {ascii(elsewhere[0]):.100}, which is no file of this folder.")
            weight_map = {name: self.path / shard for name, shard in shards.items()}
            missing = sorted({shard.name for shard in weight_map.values() if not shard.is_file()})
            if missing:
                raise UserError(f"{self.path} misses the shards {', '.join(missing)} that its index names; copy them too.")
        else:
            single = self.path / "model.safetensors"
            if not single.is_file():
                raise UserError(
                    f"{self.path} has no .safetensors files; where it has pytorch_model.bin, load it with transformers "
                    "and save it again."
                )
            with self._opened(single) as file:
                weight_map = {name: single for name in file.keys()}
        ours = {(name if name not in HEAD_NAMES else "embed_out.weight").removeprefix("gpt_neox."): (name, shard)
                for name, shard in weight_map.items() if not name.endswith(BUFFERS)}  # fmt: skip
        if self.model.tie_embeddings:
            ours.pop("embed_out.weight", None)
        absent, surplus = sorted(set(self.shapes) - set(ours)), sorted(set(ours) - set(self.shapes))
        if absent or surplus:
            what = [f"misses {absent[0]} ({len(absent)} in all)"] if absent else []
            what += [f"has {surplus[0]} ({len(surplus)} in all), which its config.json has no place for"] if surplus else []
            raise UserError(f"{self.path} {' and '.join(what)}; it is not a whole GPTNeoXForCausalLM.")
        return ours

    @contextmanager
    def _opened(self, shard: Path) -> Iterator[Any]:
        try:
            with self._open(shard, framework="pt") as file:
                yield file
        except _safetensors().SafetensorError as error:
            raise UserError(f"{shard} is damaged ({error}); copy it again.") from None

    def _check_shapes(self) -> None:
        by_shard: dict[Path, list[str]] = {}
        for name, (_, shard) in self._shard_of.items():
            by_shard.setdefault(shard, []).append(name)
        for shard, names in by_shard.items():
            with self._opened(shard) as file:
                found = {name: tuple(file.get_slice(self._shard_of[name][0]).get_shape()) for name in names}
            for name, shape in found.items():
                if shape != tuple(self.shapes[name]):
                    raise UserError(f"{shard}: {name} has shape {shape}, config.json says {tuple(self.shapes[name])}.")


class _Shard(NamedTuple):
    """One file to be written."""

    writer: int
    """Rank that writes it: the first that holds its parameters."""
    names: list[str]


def plan_shards(held: list[dict[str, int]], limit_bytes: int) -> list[_Shard]:
    """Cut the parameters into files of at most `limit_bytes` (or of one parameter), each written by one rank.

    Args:
        held: by rank, the size [bytes] of each parameter that it holds, in order; a parameter that several hold is
            written by the first of them.
    """
    shards, written = [], set()
    for rank, sizes in enumerate(held):
        names, size = [], 0
        for name in sizes:
            if name in written:
                continue
            if names and size + sizes[name] > limit_bytes:
                shards.append(_Shard(rank, names))
                names, size = [], 0
            written.add(name)
            names.append(name)
            size += sizes[name]
        if names:
            shards.append(_Shard(rank, names))
    return shards


def write_folder(
    folder: Path,
    model: Model,
    shapes: Mapping[str, torch.Size],
    read: checkpoints.Read,
    ranks: Ranks,
    dtype: torch.dtype = torch.float32,
    tokenizer: str = "",
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
) -> list[str]:
    """Write a Hugging Face folder, complete or not at all; returns what is worth knowing. A collective over all ranks.

    Args:
        shapes: parameters that this rank holds, or shares in, by global name.
        read: full tensor of one of them; every rank that names it calls this at the same time.
        dtype: type of the stored weights.
        tokenizer: what `data.tokenizer` says, for the tokenizer's files; "" writes none.
        shard_bytes: size of a file, which bounds the memory that this takes.
        replace: whether the folder may exist; its content makes way at the end.

    Raises:
        UserError: where the model cannot be expressed, the folder exists, or the disk is full; on all ranks.
    """
    doing = f"Writing the Hugging Face folder {folder}"
    with ranks.together(doing):
        small_files, remarks = describe(model, dtype, tokenizer)
        if not replace:
            checkpoints.require_new(folder)
    with new_folder(folder, doing, ranks) as temporary:
        _write_weights(temporary, shapes, read, ranks, dtype, shard_bytes, doing)
        with ranks.together(doing):
            if ranks.is_first:
                for file_name, content in small_files.items():
                    with files.ChecksumStream(temporary / file_name) as stream:
                        stream.write(content)
    return remarks


def describe(model: Model, dtype: torch.dtype, tokenizer: str) -> tuple[dict[str, bytes], list[str]]:
    """The files of a folder beside its weights, and what is worth knowing.

    Raises `UserError` where the model or its tokenizer cannot be exported, or safetensors is missing.
    """
    _safetensors()
    tokenizer_parts, eod_id, remarks = tokenizer_files(tokenizer, model)
    config = json.dumps(to_config(model, dtype, eod_id, tokenizer), indent=1).encode()
    return tokenizer_parts | {"config.json": config}, remarks


def _write_weights(
    folder: Path,
    shapes: Mapping[str, torch.Size],
    read: checkpoints.Read,
    ranks: Ranks,
    dtype: torch.dtype,
    shard_bytes: int,
    doing: str,
) -> None:
    """The shards and their index."""
    held = ranks.gather({name: shape.numel() * dtype.itemsize for name, shape in shapes.items()})
    shards = plan_shards(held, shard_bytes)
    file_names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for shard, file_name in zip(shards, file_names):
        tensors = {}
        for name in shard.names:
            whole = read(name) if name in shapes else None
            if ranks.rank == shard.writer:
                tensors[hugging_face_name(name)] = whole.detach().to("cpu", dtype).contiguous()
            del whole
        with ranks.together(doing):
            if tensors:
                _write_shard(folder / file_name, tensors)
    with ranks.together(doing):
        if ranks.is_first:
            sizes = {name: size for each in held for name, size in each.items()}
            weight_map = {hugging_face_name(name): file for shard, file in zip(shards, file_names) for name in shard.names}
            files.write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A .safetensors file, on the disk when this returns: the length of a header, the header, the tensors' bytes in order.

    The library's own writer does not flush the file, and a full disk is no `OSError` of it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": STORED_AS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with files.ChecksumStream(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            stream.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))


def export_state(
    folder: Path, model: Model, state: Mapping[str, Tensor], ranks: Ranks, dtype: torch.dtype, tokenizer: str
) -> list[str]:
    """`write_folder` from the live state of a run in any layout, replacing what is there. A collective over all ranks.

    Args:
        state: see [Note: state] of `store.py`; only names under "model." count.
    """
    weights = {
        name.removeprefix(checkpoints.PREFIX): value for name, value in state.items() if name.startswith(checkpoints.PREFIX)
    }

    def read(name: str) -> Tensor:
        value = weights[name]
        return value.full_tensor() if isinstance(value, DTensor) else value

    shapes = {name: value.shape for name, value in weights.items()}
    return write_folder(folder, model, shapes, read, ranks, dtype, tokenizer, replace=True)
