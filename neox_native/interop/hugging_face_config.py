"""What Hugging Face's config.json for GPT-NeoX can say of a model, and what it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from neox_native.config.described import described_model
from neox_native.config.schema import Model
from neox_native.errors import UserError

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}
"""Ours -> theirs."""
ACTIVATIONS_READ = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
}
OURS = "neox_native"
"""Key of config.json under which we keep the settings that Hugging Face has no word for."""
ONLY_OURS = ("vocab_size", "vocab_multiple_of", "init", "output_init", "init_std")

THEIRS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "activation": "hidden_act",
    "rotary_pct": "rotary_pct",
    "rotary_base": "rotary_emb_base",
    "seq_length": "max_position_embeddings",
    "norm_eps": "layer_norm_eps",
    "parallel_residual": "use_parallel_residual",
    "attention_bias": "attention_bias",
    "tie_embeddings": "tie_word_embeddings",
    "attention_dropout": "attention_dropout",
    "hidden_dropout": "hidden_dropout",
    "init_std": "initializer_range",
}
"""Ours -> theirs, in the order in which config.json has them."""
NEEDED = ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "seq_length", "vocab_size")
"""Settings of ours that config.json must tell: Hugging Face has other defaults for them."""


def inexpressible(model: Model) -> list[str]:
    """The settings of a model that `GPTNeoXForCausalLM` has no equal for, as "model.norm = 'rmsnorm' (why)"."""
    checks = {
        "pos_emb": (model.pos_emb == "rotary", "only rotary positions"),
        "norm": (model.norm == "layernorm", "only layernorm"),
        "activation": (model.activation in ACTIVATIONS, f"only {', '.join(ACTIVATIONS)}"),
        "num_kv_heads": (model.kv_heads == model.num_heads, "as many key and value heads as query heads"),
        "pattern": (model.pattern == Model().pattern, "attention and a feed-forward layer in each layer"),
        "mlp_bias": (model.mlp_bias, "always biases in the feed-forward layer"),
    }
    return [f"model.{name} = {getattr(model, name)!r} ({why})" for name, (fits, why) in checks.items() if not fits]


def to_config(model: Model, dtype: torch.dtype, eod_id: int | None, tokenizer: str) -> dict[str, Any]:
    """Our [model] section as config.json. Raises `UserError` naming every setting that it cannot express.

    Args:
        eod_id: the token that ends a document, where it is known.
        tokenizer: what `data.tokenizer` says; kept where it is no file.
    """
    problems = inexpressible(model)
    if problems:
        raise UserError(
            f"Hugging Face's GPTNeoXForCausalLM cannot express {'; '.join(problems)}; keep this model in our own format."
        )
    values = asdict(model) | {
        "vocab_size": model.padded_vocab_size,
        "ffn_hidden_size": model.ffn_size,
        "activation": ACTIVATIONS[model.activation],
    }
    kept = {"tokenizer": tokenizer} if tokenizer == "byte" or tokenizer.startswith("tiktoken:") else {}
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **{theirs: values[ours] for ours, theirs in THEIRS.items()},
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        OURS: {name: getattr(model, name) for name in ONLY_OURS} | kept,
    }


def table(values: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
    """An entry that is a table, or an empty one where it is null or missing. Raises `UserError` for anything else."""
    found = values.get(name)
    if found is not None and not isinstance(found, dict):
        raise UserError(f"{file}: {name} is no table.")
    return found or {}


def from_config(config: Mapping[str, Any], file: Path) -> Model:
    """config.json as our [model] section. Raises `UserError` for another architecture or an unknown feature of it, and for
    what no model can be."""
    if config.get("model_type") != "gpt_neox":
        raise UserError(
            f"{file} is of a model of type {config.get('model_type')!r:.60}; only 'gpt_neox' (GPTNeoXForCausalLM: "
            "GPT-NeoX-20B, Pythia) can be read."
        )
    missing = [THEIRS[name] for name in NEEDED if config.get(THEIRS[name]) is None]
    if missing:
        raise UserError(f"{file} has no {', '.join(missing)}; it is not whole.")
    rope = table(config, "rope_scaling", file) | table(config, "rope_parameters", file)
    kind = rope.get("rope_type", rope.get("type", "default"))
    activation = config.get("hidden_act", "gelu")
    if kind != "default" or not isinstance(activation, str) or activation not in ACTIVATIONS_READ:
        raise UserError(
            f"{file} has rotary positions of type {kind!r:.60} and hidden_act = {activation!r:.60}; this model has type "
            f"'default' and {', '.join(sorted(ACTIVATIONS_READ))}."
        )
    told = {ours: config.get(theirs) for ours, theirs in THEIRS.items() if ours not in ("activation", "init_std")}
    turned = {"rotary_pct": rope.get("partial_rotary_factor"), "rotary_base": rope.get("rope_theta")}
    told |= {name: value for name, value in turned.items() if value is not None}
    kept = {name: value for name, value in table(config, OURS, file).items() if name in ONLY_OURS}
    values = {name: value for name, value in told.items() if value is not None}
    model = described_model({**values, "activation": ACTIVATIONS_READ[activation], "vocab_multiple_of": 1, **kept}, file)
    if model.padded_vocab_size != config["vocab_size"]:
        raise UserError(
            f"{file} contradicts itself: vocab_size = {config['vocab_size']!r:.60}, but its {OURS} entry makes "
            f"{model.padded_vocab_size} rows; remove that entry."
        )
    return replace(model, ffn_hidden_size=0) if model.ffn_size == 4 * model.hidden_size else model
