"""The arithmetic of rows, without a process group."""

from __future__ import annotations

import math
import random

import torch

from neox_native.zero.layout import ALIGNMENT, Layout, lay_out


def shapes_of(rng: random.Random) -> list[tuple[int, ...]]:
    return [tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(1, 5))]


def layouts() -> list[Layout]:
    rng = random.Random(0)
    return [lay_out(shapes_of(rng), rng.randint(1, 7)) for _ in range(200)]


def test_chunks_are_those_of_torch_chunk() -> None:
    for layout in layouts():
        for slot in layout.slots:
            chunks = torch.arange(slot.shape[0]).chunk(layout.world)
            for rank in range(layout.world):
                expected = chunks[rank].tolist() if rank < len(chunks) else []
                assert list(range(*slot.span(rank))) == expected


def elements(layout: Layout, rank: int) -> int:
    """How many `rank` owns."""
    return sum(math.prod(slot.local_shape(rank)) for slot in layout.slots)


def test_every_element_has_one_owner() -> None:
    for layout in layouts():
        total = sum(elements(layout, rank) for rank in range(layout.world))
        assert total == sum(math.prod(slot.shape) for slot in layout.slots)


def test_slots_are_aligned_and_do_not_overlap() -> None:
    for layout in layouts():
        end = 0
        for slot in layout.slots:
            assert slot.offset % ALIGNMENT == 0 and slot.offset >= end
            end = slot.offset + slot.width
        assert end <= layout.size


def test_padding_is_below_one_alignment_and_one_chunk_row_per_slot() -> None:
    for layout in layouts():
        needed = sum(math.prod(slot.shape) for slot in layout.slots)
        spare = sum(layout.world * (ALIGNMENT + slot.inner) for slot in layout.slots)
        assert needed <= layout.world * layout.size < needed + spare


def test_more_ranks_than_rows_leaves_empty_shards() -> None:
    layout = lay_out([(3, 2)], world=5)
    assert [layout.slots[0].local_shape(rank) for rank in range(5)] == [(1, 2), (1, 2), (1, 2), (0, 2), (0, 2)]


def test_one_rank_owns_everything() -> None:
    layout = lay_out([(5, 3), (7,)], world=1)
    assert elements(layout, 0) == 22 and layout.slots[0].span(0) == (0, 5)
