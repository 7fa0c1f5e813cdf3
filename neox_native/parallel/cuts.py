"""Where tensor parallelism has no equal parts to cut. Pure arithmetic.

[Note: short share] A vocabulary of W rows over tp ranks is cut as torch.chunk cuts it: V = ceil(W / tp) rows each; the
last rank has what is left.

[Note: shared heads] With fewer key-value heads than tp ranks, r = tp / K neighbours share one. The fused projection's
rows are [K, (G queries, key, value), H]. Rank t has the G / r query heads of its own that belong to head t // r, and a
copy of that head's key and value, which r ranks hold alike. So its part is that of a model with tp key-value heads (see
`held`), and only the rows of the whole projection that it stands for are no even cut.
"""

from __future__ import annotations

from dataclasses import replace

from neox_native.config.schema import Model

PROJECTION = ("attention.query_key_value.weight", "attention.query_key_value.bias")


def share_of_vocabulary(rows: int, tp: int) -> int:
    """V of [Note: short share]."""
    return -(-rows // tp)


def sharers(model: Model, tp: int) -> int:
    """r of [Note: shared heads]: ranks that hold the same key-value head; 1 where heads are cut."""
    return max(1, tp // model.kv_heads)


def held(model: Model, tp: int) -> Model:
    """The model whose even parts tp ranks hold: a shared key-value head counts once for each of its ranks."""
    return replace(model, num_kv_heads=tp) if sharers(model, tp) > 1 else model


def rows_of_rank(name: str, model: Model, tp: int, tp_rank: int) -> tuple[range, range] | None:
    """Of a fused projection with shared heads, by the parameter's global name: the rows of the whole that this rank has
    alone, and those that it shares, in the order in which it holds them. None for a parameter that is cut evenly."""
    ranks_per_head = sharers(model, tp)
    if ranks_per_head == 1 or not name.endswith(PROJECTION):
        return None
    group, head_dim = model.num_heads // model.kv_heads, model.head_dim
    head, number = divmod(tp_rank, ranks_per_head)
    first, own = head * (group + 2) * head_dim, group // ranks_per_head * head_dim
    key = first + group * head_dim
    return range(first + number * own, first + (number + 1) * own), range(key, key + 2 * head_dim)


def rows_of_whole(model: Model) -> int:
    """Rows of the whole fused projection."""
    return (model.num_heads + 2 * model.kv_heads) * model.head_dim
