"""The sample order equals GPT-NeoX's, as a plain loop reads it."""

from __future__ import annotations

import numpy as np
import pytest

from neox_native.data.order import NeoxOrder, epochs_needed, rows_of_rank, split_documents
from tests.data.corpora import neox_samples, random_documents


def read(documents: list[list[int]], order: NeoxOrder, sample: int) -> list[int]:
    segments = order.segments(sample)
    assert all(segment.length > 0 for segment in segments)
    return [token for document, offset, length in segments for token in documents[document][offset : offset + length]]


@pytest.mark.parametrize("seed", range(40))
def test_neox_order_equals_a_plain_reading(seed: int) -> None:
    draw = np.random.RandomState(seed)
    documents = random_documents(seed, int(draw.randint(1, 30)), longest=int(draw.choice([3, 40]))) + [[7, 8, 9]] * 4
    seq_length, needed = int(draw.choice([1, 2, 7, 10])), int(draw.randint(0, 120))
    first = int(draw.randint(0, len(documents) - 3))
    sizes = np.array([len(document) for document in documents], np.int32)
    order = NeoxOrder(range(first, len(documents)), sizes, seq_length, needed, seed)
    expected = neox_samples(documents, first, len(documents), seq_length, needed, seed)
    assert order.num_samples == len(expected) >= needed
    assert [read(documents, order, sample) for sample in range(order.num_samples)] == expected


@pytest.mark.parametrize("sizes", [[4, 4, 4], [0, 4, 0, 8, 0], [12], [1] * 12, [0, 0, 0, 12, 0]])
@pytest.mark.parametrize("seq_length", [1, 2, 4, 11])
def test_exact_boundaries_and_empty_documents(sizes: list[int], seq_length: int) -> None:
    documents = [[100 * number + token for token in range(size)] for number, size in enumerate(sizes)]
    for needed in (1, 11 // seq_length, 40):
        order = NeoxOrder(range(len(sizes)), np.array(sizes, np.int32), seq_length, needed, seed=5)
        expected = neox_samples(documents, 0, len(sizes), seq_length, needed, seed=5)
        assert [read(documents, order, sample) for sample in range(order.num_samples)] == expected


def test_neighbouring_samples_share_one_token() -> None:
    documents = [list(range(50))]
    order = NeoxOrder(range(1), np.array([50], np.int32), 7, 1, seed=0)
    packed = [
        [
            token
            for segment in order.stream.segments(sample)
            for token in documents[0][segment.offset :][: segment.length]
        ]
        for sample in range(7)
    ]
    assert packed == [list(range(7 * sample, 7 * sample + 8)) for sample in range(7)]


def test_totals_beyond_32_bits_do_not_overflow() -> None:
    sizes = np.full(3, 2**31 - 1, np.int32)
    order = NeoxOrder(range(3), sizes, 2**20, 1, seed=0)
    last = order.stream.segments(order.num_samples - 1)
    assert last[-1].offset + last[-1].length <= 2**31 - 1 and min(segment.offset for segment in last) >= 0


def test_epochs_are_the_fewest_that_suffice() -> None:
    for tokens in range(5, 30):
        for needed in range(0, 30):
            epochs = epochs_needed(tokens, 4, needed)
            assert (epochs * tokens - 1) // 4 >= needed and (epochs == 1 or ((epochs - 1) * tokens - 1) // 4 < needed)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 10, 99, 1000, 1003])
@pytest.mark.parametrize("shares", [[969, 30, 1], [995, 4, 1], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0.5, 0.25, 0.25]])
def test_splits_are_contiguous_and_rounded_like_neox(size: int, shares: list[float]) -> None:
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + int(round(share / sum(shares) * float(size))))
    difference = bounds[-1] - size
    for index in range(1, 4):
        bounds[index] -= difference
    assert [(part.start, part.stop) for part in split_documents(shares, size)] == [
        (bounds[k], bounds[k + 1]) for k in range(3)
    ]


@pytest.mark.parametrize("dp_size, micro", [(1, 24), (2, 3), (3, 4), (4, 1), (8, 3), (1, 1)])
def test_the_rows_of_all_ranks_are_the_global_batch_whatever_the_layout(dp_size: int, micro: int) -> None:
    seen = []
    for rank in range(dp_size):
        rows = rows_of_rank(24, micro, rank, dp_size)
        for group in range(rows.shape[0]):
            for row in range(micro):
                assert rows[group, row] == group * dp_size * micro + rank * micro + row
        seen += rows.flatten().tolist()
    assert sorted(seen) == list(range(24))
