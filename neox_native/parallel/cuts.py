"""Where tensor parallelism has no equal parts to cut. Pure arithmetic.

[Note: short share] A vocabulary of W rows over tp ranks is cut as torch.chunk cuts it: V = ceil(W / tp) rows each; the
last rank has what is left.

[Note: shared heads] Some parameters have K groups of rows that belong together (`RowGroups`): the queries of a key-value
head, and that head. With fewer groups than tp ranks, r = tp / K neighbours share one. Rank t has 1 / r of the rows that
can be dealt out of group t // r, and a copy of the group's other rows, which r ranks hold alike. So it runs an even part of a
model with tp groups (see `model.kinds.dealt`), and `rows_of_rank` says which rows of the true parameter that part holds.
"""

from __future__ import annotations

from neox_native.model.parameters import Card


def share_of_vocabulary(rows: int, tp: int) -> int:
    """V of [Note: short share]."""
    return -(-rows // tp)


def local_shape(card: Card, tp: int) -> tuple[int, ...]:
    """The shape of a parameter on the ranks that have most of it, where tp cuts it evenly or as [Note: short share]."""
    return tuple(share_of_vocabulary(size, tp) if dim == card.cut else size for dim, size in enumerate(card.shape))


def sharers(card: Card, tp: int) -> int:
    """r of [Note: shared heads]: ranks that hold a copy of the same rows; 1 where the parameter is cut evenly."""
    return max(1, tp // card.groups.count) if card.groups else 1


def rows_of_rank(card: Card, tp: int, tp_rank: int) -> tuple[range, range] | None:
    """The rows of the whole parameter that a rank has alone, and those that it shares, in the order in which it holds them.
    None for a parameter that is cut evenly."""
    if sharers(card, tp) == 1:
        return None
    groups = card.groups
    group, number = divmod(tp_rank, sharers(card, tp))
    first, own = group * (groups.own + groups.copied), groups.own // sharers(card, tp)
    copied = first + groups.own
    return range(first + number * own, first + (number + 1) * own), range(copied, copied + groups.copied)
