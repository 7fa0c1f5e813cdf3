"""What Hugging Face's config.json for GPT-NeoX can say of a model, and what it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

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


def to_config(model: Model, dtype: torch.dtype, eod_id: int | None, tokenizer: str) -> dict[str, Any]:
    """Our [model] section as config.json. Raises `UserError` naming every setting that it cannot express.

    Args:
        eod_id: the token that ends a document, where it is known.
        tokenizer: what `data.tokenizer` says; kept where it is no file.
    """
    problems = inexpressible(model)
    if problems:
        raise UserError(
            f"Hugging Face's GPTNeoXForCausalLM cannot express {'; '.join(problems)}; "
            "keep this model in our own format."
        )
    kept = {"tokenizer": tokenizer} if tokenizer == "byte" or tokenizer.startswith("tiktoken:") else {}
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
        OURS: {name: getattr(model, name) for name in ONLY_OURS} | kept,
    }


def from_config(config: Mapping[str, Any], path: Path) -> Model:
    """config.json as our [model] section. Raises `UserError` for another architecture or an unknown feature of it."""
    if config.get("model_type") != "gpt_neox":
        raise UserError(
            f"{path} is a model of type {config.get('model_type')!r}; only 'gpt_neox' (GPTNeoXForCausalLM: "
            "GPT-NeoX-20B, Pythia) can be read."
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
