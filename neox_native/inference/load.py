"""A trained model, laid out over a mesh for inference: from our checkpoints or from a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from neox_native.checkpoint import files, store
from neox_native.checkpoint.tokenizer_files import own_tokenizer
from neox_native.config import layout_rules
from neox_native.config.schema import Compile, Config, Model, Parallel, Training
from neox_native.errors import UserError
from neox_native.interop import checkpoints
from neox_native.interop.hugging_face import HuggingFaceReader
from neox_native.launch import Ranks
from neox_native.mesh import Mesh, build_mesh
from neox_native.model.transformer import Transformer, cards
from neox_native.parallel import tensor
from neox_native.parallel.assemble import assemble, local_slice
from neox_native.parallel.cuts import rows_of_rank
from neox_native.zero.state import Boxes
from neox_native.zero.spec import local


@dataclass(frozen=True)
class Loaded:
    """This rank's part of a model, ready to run."""

    model: Model
    part: Transformer
    tokenizer: str
    """What `data.tokenizer` would say; "" where the checkpoint does not tell."""
    mesh: Mesh
    device: torch.device


def inference_mesh(pp: int, tp: int, world_size: int, device: torch.device) -> Mesh:
    """A mesh of pp * tp ranks. Raises `UserError` where that is not the number of processes."""
    if pp * tp != world_size:
        raise UserError(
            f"pp({pp}) * tp({tp}) = {pp * tp} ranks hold one copy of the model, but {world_size} processes were "
            "started; make the two equal."
        )
    return build_mesh(Parallel(pp=pp, dp=1, tp=tp), device)


def load_model(path: str | Path, mesh: Mesh, dtype: str, device: torch.device) -> Loaded:
    """Load the weights of a checkpoint, of a run's newest checkpoint, or of a Hugging Face folder. A collective.

    Nothing is held but this rank's share in the type that was asked for.

    Args:
        mesh: from `inference_mesh`.
        dtype: "fp32", "bf16" or "fp16".

    Raises:
        UserError: where the checkpoint is missing, damaged or of another architecture, cannot be cut so, or holds weights
            that are not finite in `dtype`.
    """
    ranks = Ranks()
    with ranks.together(f"Opening {path}"):
        source = _open(Path(path))
        model = (
            source.model if isinstance(source, HuggingFaceReader) else checkpoints.model_of(files.read_metadata(source), source)
        )
    if not isinstance(source, HuggingFaceReader):
        checkpoints.require_held(model, source, ranks)
    part = _empty_part(model, mesh, dtype, device)
    weights = {name: parameter.detach() for name, parameter in part.named_parameters()}
    described = {name: cards(model)[part.global_name(name)] for name in weights}
    rows = {name: rows_of_rank(described[name], mesh.tensor.size, mesh.tensor.rank) for name in weights}
    if isinstance(source, HuggingFaceReader):
        with ranks.together(f"Loading {path}"):
            for name, weight in weights.items():
                local(weight).copy_(local_slice(source(part.global_name(name)), weight, rows[name]))
        tokenizer = source.tokenizer
    else:
        state = {
            checkpoints.PREFIX + part.global_name(name): weight
            if rows[name] is None
            else Boxes(weight.to_local(), rows[name], described[name].shape[0])
            for name, weight in weights.items()
        }
        tokenizer = own_tokenizer(source, store.load(source, state, ranks, only=checkpoints.PREFIX))
    _require_finite(path, {part.global_name(name): weight for name, weight in weights.items()}, dtype, ranks)
    part.build_tables(device)
    if mesh.tensor.size > 1:
        tensor.shard_tables(part, mesh.tensor.mesh)
    return Loaded(model, part.eval(), tokenizer, mesh, device)


def _require_finite(path: str | Path, weights: Mapping[str, Tensor], dtype: str, ranks: Ranks) -> None:
    """Raise `UserError` on all ranks, naming the first tensor of the first rank that is not finite."""
    broken = next((name for name, weight in weights.items() if not local(weight).isfinite().all()), None)
    if found := [name for name in ranks.gather(broken) if name]:
        raise UserError(
            f"{path} cannot be run: {found[0]} holds numbers that are not finite in {dtype}; take a checkpoint from before "
            "they broke, or another --dtype."
        )


def _open(path: Path) -> HuggingFaceReader | Path:
    if not path.exists():
        raise UserError(f"{path} does not exist; name a checkpoint, a run's folder or a Hugging Face folder.")
    return HuggingFaceReader(path) if (path / "config.json").is_file() else checkpoints.find_checkpoint(path)


def _empty_part(model: Model, mesh: Mesh, dtype: str, device: torch.device) -> Transformer:
    """This rank's part with memory for its parameters."""
    parallel = Parallel(pp=mesh.pipeline.size, dp=1, tp=mesh.tensor.size)
    config = Config(model=model, parallel=parallel)
    for rule in (layout_rules.tensor_parallel, layout_rules.stages):
        for sentence in rule(config, parallel.pp * parallel.tp):
            raise UserError(sentence)
    (part,) = assemble(model, parallel, Training(precision=dtype), Compile(), mesh).values()
    for module in part.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty: Tensor = torch.empty_like(parameter, device=device)
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    part.tie()
    return part
