"""Closed forms: parameters of a model and the floating-point operations of training it. Pure arithmetic."""

from __future__ import annotations

from neox_native.config.schema import Model


def lookup_parameters(model: Model) -> int:
    """Parameters that are only looked up, never multiplied: the untied embedding and learned positions."""
    tokens = 0 if model.tie_embeddings else model.padded_vocab_size * model.hidden_size
    positions = model.seq_length * model.hidden_size if model.pos_emb == "learned" else 0
    return tokens + positions


def layer_parameters(model: Model) -> int:
    """Parameters of one block; 12 h^2 + 13 h for GPT-NeoX's own."""
    hidden, ffn = model.hidden_size, model.ffn_size
    qkv_rows = (model.num_heads + 2 * model.kv_heads) * model.head_dim
    up_projections = 2 if model.gated else 1
    matrices = qkv_rows * hidden + hidden * hidden + (up_projections + 1) * ffn * hidden
    attention_biases = qkv_rows + hidden if model.attention_bias else 0
    mlp_biases = up_projections * ffn + hidden if model.mlp_bias else 0
    return matrices + attention_biases + mlp_biases + 2 * norm_parameters(model)


def norm_parameters(model: Model) -> int:
    """Parameters of one norm."""
    return (2 if model.norm == "layernorm" else 1) * model.hidden_size


def total_parameters(model: Model) -> int:
    """Parameters of the whole model; 2 V h + L (12 h^2 + 13 h) + 2 h for GPT-NeoX's own."""
    head = model.padded_vocab_size * model.hidden_size
    return lookup_parameters(model) + model.num_layers * layer_parameters(model) + norm_parameters(model) + head


def model_flops_per_token(model: Model) -> int:
    """Forward and backward operations per token [FLOP]: 6 (N - N_lookup) + 12 L h s.

    Attention counts every pair of positions, not the causal half, and recomputation is left out, as in PaLM's
    appendix B (Chowdhery et al. 2022): that keeps MFU comparable with published numbers.
    """
    attention = 12 * model.num_layers * model.hidden_size * model.seq_length
    return 6 * (total_parameters(model) - lookup_parameters(model)) + attention
