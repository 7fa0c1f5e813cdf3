"""Hugging Face `GPTNeoXForCausalLM` folders: what they can express, read and written a shard at a time.

    config.json, model-00001-of-00003.safetensors, ..., model.safetensors.index.json, tokenizer.json

Parameters have our names behind the prefix `gpt_neox.`, but for the head, which is `embed_out.weight` (`lm_head.weight`
in some releases).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from neox_native.checkpoint import files, interop
from neox_native.checkpoint.agree import Ranks
from neox_native.checkpoint.tokenizer_files import tokenizer_files
from neox_native.config.schema import Model
from neox_native.errors import UserError

HEAD_NAMES = ("embed_out.weight", "lm_head.weight")
BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
"""Constants that old releases stored among the weights."""
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}
"""Ours -> theirs."""
ACTIVATIONS_READ = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {
    "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu",
}  # fmt: skip
OURS = "neox_native"
"""Key of config.json under which we keep the settings that Hugging Face has no word for."""
ONLY_OURS = ("vocab_size", "vocab_multiple_of", "init", "output_init", "init_std")
SHARD_BYTES = 4 * 10**9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(
            "Hugging Face folders need the package safetensors, which is an optional extra: pip install 'neox-native[hf]'."
        ) from None
    return safetensors


def hugging_face_name(name: str) -> str:
    """Their name of our parameter."""
    return name if name == "embed_out.weight" else f"gpt_neox.{name}"


def inexpressible(model: Model) -> list[str]:
    """The settings of a model that `GPTNeoXForCausalLM` has no equal for, as "model.norm = 'rmsnorm' (why)"."""
    checks = {
        "pos_emb": (model.pos_emb == "rotary", "only rotary positions"),
        "norm": (model.norm == "layernorm", "only layernorm"),
        "activation": (model.activation in ACTIVATIONS, f"only {', '.join(ACTIVATIONS)}"),
        "num_kv_heads": (model.kv_heads == model.num_heads, "as many key and value heads as query heads"),
        "mlp_bias": (model.mlp_bias, "always biases in the feed-forward layer"),
    }
    return [f"model.{name} = {getattr(model, name)!r} ({why})" for name, (fits, why) in checks.items() if not fits]


def to_config(model: Model, dtype: torch.dtype, eod_id: int | None) -> dict[str, Any]:
    """Our [model] section as config.json. Raises `UserError` naming every setting that it cannot express.

    Args:
        eod_id: the token that ends a document, where it is known.
    """
    problems = inexpressible(model)
    if problems:
        raise UserError(
            f"Hugging Face's GPTNeoXForCausalLM cannot express {'; '.join(problems)}; keep this model in our own format."
        )
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": model.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.ffn_size,
        "hidden_act": ACTIVATIONS[model.activation],
        "rotary_pct": model.rotary_pct,
        "rotary_emb_base": model.rotary_base,
        "max_position_embeddings": model.seq_length,
        "layer_norm_eps": model.norm_eps,
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": model.attention_bias,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
        "initializer_range": model.init_std,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        OURS: {name: getattr(model, name) for name in ONLY_OURS},
    }


def from_config(config: Mapping[str, Any], path: Path) -> Model:
    """config.json as our [model] section. Raises `UserError` for another architecture or an unknown feature of it."""
    if config.get("model_type") != "gpt_neox":
        raise UserError(
            f"{path} is a model of type {config.get('model_type')!r}; only 'gpt_neox' (GPTNeoXForCausalLM: GPT-NeoX-20B, "
            "Pythia) can be read."
        )
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    activation = config.get("hidden_act", "gelu")
    if kind != "default" or activation not in ACTIVATIONS_READ:
        raise UserError(
            f"{path} has rotary positions of type {kind!r} and hidden_act = {activation!r}; this model has type "
            f"'default' and {', '.join(sorted(ACTIVATIONS_READ))}."
        )
    extras = {name: value for name, value in config.get(OURS, {}).items() if name in ONLY_OURS}
    model = Model(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        ffn_hidden_size=config["intermediate_size"] if config["intermediate_size"] != 4 * config["hidden_size"] else 0,
        seq_length=config["max_position_embeddings"],
        rotary_pct=rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25)),
        rotary_base=float(rope.get("rope_theta", config.get("rotary_emb_base", 10000))),
        parallel_residual=config.get("use_parallel_residual", True),
        norm_eps=config.get("layer_norm_eps", 1e-5),
        activation=ACTIVATIONS_READ[activation],
        attention_bias=config.get("attention_bias", True),
        tie_embeddings=config.get("tie_word_embeddings", False),
        attention_dropout=config.get("attention_dropout", 0.0),
        hidden_dropout=config.get("hidden_dropout", 0.0),
        **({"vocab_size": config["vocab_size"], "vocab_multiple_of": 1} | extras),
    )
    if model.padded_vocab_size != config["vocab_size"]:
        raise UserError(
            f"{path} contradicts itself: vocab_size = {config['vocab_size']}, but its {OURS} entry makes "
            f"{model.padded_vocab_size} rows; remove that entry."
        )
    return model


class HuggingFaceReader:
    """A Hugging Face folder, read one tensor at a time.

    Raises `UserError` where it is of another architecture, or misses shards or tensors.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.config = _json(self.path / "config.json")
        try:
            self.model = from_config(self.config, self.path)
        except KeyError as error:
            raise UserError(f"{self.path / 'config.json'} has no {error}; it is not whole.") from None
        self.shapes = interop.parameter_shapes(self.model)
        self._open = _safetensors().safe_open
        self._shard_of = self._find_tensors()
        self._check_shapes()

    def __call__(self, name: str) -> Tensor:
        """The parameter of our global name, in the type in which it is stored."""
        theirs, shard = self._shard_of[name]
        with self._open(shard, framework="pt") as file:
            return file.get_tensor(theirs)

    def _find_tensors(self) -> dict[str, tuple[str, Path]]:
        """Our name -> their name and the shard that holds it."""
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            weight_map = {name: self.path / shard for name, shard in _json(index)["weight_map"].items()}
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
            with self._open(single, framework="pt") as file:
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

    def _check_shapes(self) -> None:
        by_shard: dict[Path, list[str]] = {}
        for name, (_, shard) in self._shard_of.items():
            by_shard.setdefault(shard, []).append(name)
        for shard, names in by_shard.items():
            try:
                with self._open(shard, framework="pt") as file:
                    found = {name: tuple(file.get_slice(self._shard_of[name][0]).get_shape()) for name in names}
            except _safetensors().SafetensorError as error:
                raise UserError(f"{shard} is damaged ({error}); copy it again.") from None
            for name, shape in found.items():
                if shape != tuple(self.shapes[name]):
                    raise UserError(f"{shard}: {name} has shape {shape}, config.json says {tuple(self.shapes[name])}.")


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {path.parent} is no Hugging Face folder.") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON file: {error}.") from None
