"""What GPT-NeoX's YAML files say of a model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from neox_native.config.described import described_model
from neox_native.config.schema import Model
from neox_native.errors import UserError
from neox_native.plain_files import read_text

ENTRY = re.compile(r"""\s*["']?([A-Za-z_][\w-]*)["']?\s*:([^{\[]*)""")
WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None, "~": None}
NEEDED = ("num_layers", "hidden_size", "num_attention_heads")
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}


def find_yaml(folder: Path) -> list[Path]:
    """GPT-NeoX's settings beside a checkpoint: in its `configs` folder, in the one above, or in itself."""
    for place in (folder / "configs", folder.parent / "configs", folder):
        found = sorted([*place.glob("*.yml"), *place.glob("*.yaml")])
        if found:
            return found
    return []


def read_scalars(file: Path) -> dict[str, Any]:
    """Every `name: number, word or text` line of a YAML file, whatever it is nested in; dashes become underscores.

    An architecture needs no more of YAML than that.
    """
    values: dict[str, Any] = {}
    for line in read_text(file).splitlines():
        if match := ENTRY.fullmatch(line.partition("#")[0]):
            values[match[1].replace("-", "_")] = _scalar(match[2].strip().removesuffix(",").rstrip())
    return values


def _scalar(text: str) -> Any:
    if text in WORDS:
        return WORDS[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text.strip("\"'")


def model_from_yaml(files: list[Path], vocab_size: int) -> Model:
    """The [model] section of a checkpoint of GPT-NeoX, with its defaults. Raises `UserError` for what we cannot express.

    Args:
        files: its YAML files; a later one overrides.
        vocab_size: ids that the tokenizer has.
    """
    values: dict[str, Any] = {}
    for file in files:
        values |= read_scalars(file)
    shown = ", ".join(str(file) for file in files)
    missing = [name for name in NEEDED if values.get(name) is None]
    if missing:
        raise UserError(f"{shown} does not say {', '.join(missing)}; describe the model with --config instead.")
    activation, norm = values.get("activation", "gelu"), values.get("norm", "layernorm")
    refused = {
        "activation": activation not in ACTIVATIONS,
        "norm": norm not in ("layernorm", "rmsnorm"),
        "gpt_j_tied": bool(values.get("gpt_j_tied", False)),
        "pos_emb": values.get("pos_emb", "learned") == "rpe",
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise UserError(f"{shown}: {name} = {values[name]!r} is a form of the model that cannot be expressed here.")
    tanh = activation == "gelu" and values.get("bias_gelu_fusion", False)  # the fused kernel approximates
    model = described_model(
        {
            "num_layers": values["num_layers"],
            "hidden_size": values["hidden_size"],
            "num_heads": values["num_attention_heads"],
            "num_kv_heads": values.get("num_kv_heads") or 0,
            "ffn_hidden_size": values.get("intermediate_size") or 0,
            "seq_length": values.get("max_position_embeddings") or values.get("seq_length") or 2048,
            "vocab_size": vocab_size,
            "vocab_multiple_of": values.get("make_vocab_size_divisible_by", 128),
            "pos_emb": values.get("pos_emb", "learned"),
            "rotary_pct": values.get("rotary_pct", 1.0),
            "rotary_base": values.get("rotary_emb_base", 10000),
            "parallel_residual": bool(values.get("gpt_j_residual", False)),
            "norm": norm,
            "norm_eps": values.get("layernorm_epsilon", 1e-5) if norm == "layernorm" else values.get("rms_norm_epsilon", 1e-8),
            "activation": "gelu_tanh" if tanh else ACTIVATIONS[activation],
            "tie_embeddings": not values.get("no_weight_tying", False),
        },
        shown,
    )
    return replace(
        model,
        num_kv_heads=0 if model.kv_heads == model.num_heads else model.kv_heads,
        ffn_hidden_size=0 if model.ffn_size == 4 * model.hidden_size else model.ffn_size,
    )
