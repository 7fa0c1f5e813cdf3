"""The sample order equals GPT-NeoX's, as a plain loop reads it."""

from __future__ import annotations

import numpy as np
import pytest

from neox_native.data.order import (
    Corpus,
    EpochOrder,
    NeoxOrder,
    Order,
    StoredOrder,
    epochs_needed,
    rows_of_rank,
    split_documents,
)
from neox_native.errors import UserError
from tests.data.corpora import neox_samples, random_documents, whole_document_samples


def corpus(
    sizes: list[int], seq_length: int, first: int = 0, packing: str = "packed", usable: list[bool] | None = None
) -> Corpus:
    mask = None if usable is None else np.array(usable)
    return Corpus(range(first, len(sizes)), np.array(sizes, np.int32), seq_length, packing, mask)  # type: ignore[arg-type]


def read(documents: list[list[int]], order: Order, sample: int) -> list[int]:
    segments = order.segments(sample)
    assert all(segment.length > 0 for segment in segments)
    return [token for document, offset, length in segments for token in documents[document][offset : offset + length]]


@pytest.mark.parametrize("seed", range(40))
def test_neox_order_equals_a_plain_reading(seed: int) -> None:
    draw = np.random.RandomState(seed)
    documents = random_documents(seed, int(draw.randint(1, 30)), longest=int(draw.choice([3, 40]))) + [[7, 8, 9]] * 4
    seq_length, needed = int(draw.choice([1, 2, 7, 10])), int(draw.randint(0, 120))
    first = int(draw.randint(0, len(documents) - 3))
    sizes = [len(document) for document in documents]
    order = NeoxOrder(corpus(sizes, seq_length, first), needed, seed)
    expected = neox_samples(documents, first, len(documents), seq_length, needed, seed)
    assert order.num_samples == len(expected) >= needed
    assert [read(documents, order, sample) for sample in range(order.num_samples)] == expected


@pytest.mark.parametrize("sizes", [[4, 4, 4], [0, 4, 0, 8, 0], [12], [1] * 12, [0, 0, 0, 12, 0]])
@pytest.mark.parametrize("seq_length", [1, 2, 4, 11])
def test_exact_boundaries_and_empty_documents(sizes: list[int], seq_length: int) -> None:
    documents = [[100 * number + token for token in range(size)] for number, size in enumerate(sizes)]
    for needed in (1, 11 // seq_length, 40):
        order = NeoxOrder(corpus(sizes, seq_length), needed, seed=5)
        expected = neox_samples(documents, 0, len(sizes), seq_length, needed, seed=5)
        assert [read(documents, order, sample) for sample in range(order.num_samples)] == expected


def test_neighbouring_samples_share_one_token() -> None:
    documents = [list(range(50))]
    order = NeoxOrder(corpus([50], 7), 1, seed=0)
    packed = [
        [
            token
            for segment in order.stream.segments(sample)
            for token in documents[0][segment.offset :][: segment.length]
        ]
        for sample in range(7)
    ]
    assert packed == [list(range(7 * sample, 7 * sample + 8)) for sample in range(7)]


@pytest.mark.parametrize("packing", ["packed", "unpacked", "pack_until_overflow"])
@pytest.mark.parametrize("told", [False, True], ids=["steps", "metadata.json"])
def test_an_order_beyond_this_machines_memory_is_refused(packing: str, told: bool) -> None:
    begun: dict[str, object] = {"order": "neox", "epochs": [10**15], "samples": [10**15]} if told else {}
    with pytest.raises(UserError, match="documents and samples take .* GiB or more.*lower training.steps"):
        NeoxOrder(corpus([4] * 8, 4, packing=packing, usable=[True] * 8), 10 if told else 10**15, seed=0, begun=begun)


def test_totals_beyond_32_bits_do_not_overflow() -> None:
    sizes = [2**31 - 1] * 3
    order = NeoxOrder(corpus(sizes, 2**20), 1, seed=0)
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


@pytest.mark.parametrize("packing", ["pack_until_overflow", "unpacked"])
@pytest.mark.parametrize("seed", range(12))
def test_whole_documents_equal_a_plain_reading(packing: str, seed: int) -> None:
    documents = random_documents(seed, 17, longest=int([6, 15, 40][seed % 3])) + [[1, 2], [3, 4]]
    sizes = [len(document) for document in documents]
    usable = [size > 1 and number % 7 != 3 for number, size in enumerate(sizes)]
    for needed in (0, 1, 5, 60):
        order = NeoxOrder(corpus(sizes, 10, 4, packing, usable), needed, seed)
        kept = [number for number in range(4, 19) if usable[number]]
        expected = whole_document_samples(documents, kept, packing, 10, needed, seed, 4, 19)
        assert [read(documents, order, sample) for sample in range(order.num_samples)] == expected


PACKINGS = ["packed", "pack_until_overflow", "unpacked"]


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_epoch_reads_each_token_once_in_an_order_of_its_own(packing: str) -> None:
    sizes = [5, 3, 9, 1, 4, 8, 2]
    documents = [[100 * number + token for token in range(size)] for number, size in enumerate(sizes)]
    order = EpochOrder(corpus(sizes, 9 if packing != "packed" else 4, 0, packing, [True] * 7), seed=3)
    everything = sorted(token for document in documents for token in document)
    position, epochs = 0, []
    for _ in range(4):
        seen: list[int] = []
        first = position
        while (sample := read(documents, order, position)) and len(seen) < (28 if packing == "packed" else 32):
            seen += sample[:-1] if packing == "packed" else sample
            position += 1
        epochs.append(seen)
        assert len(set(seen)) == len(seen) and position > first
        assert packing == "packed" or sorted(seen) == everything
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_endless_order_may_be_entered_anywhere(packing: str) -> None:
    made = [EpochOrder(corpus([5, 3, 9, 1, 4, 8, 2], 5, 0, packing, [True] * 7), seed=3) for _ in range(2)]
    forwards = [made[0].segments(sample) for sample in range(40)]
    assert [made[1].segments(sample) for sample in reversed(range(40))] == forwards[::-1]


def test_stored_rows_come_as_they_lie() -> None:
    order = StoredOrder(corpus([6] * 5, 5, first=2))
    assert [order.segments(sample) for sample in range(order.num_samples)] == [
        [(2 + sample, 0, 6)] for sample in range(3)
    ]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", ["neox", "epoch", "stored"])
def test_samples_of_a_document_are_those_that_hold_a_token_of_it(packing: str, kind: str) -> None:
    sizes = [6] * 9 if kind == "stored" else [5, 3, 9, 0, 1, 4, 28, 2, 7]
    described = corpus(sizes, 5, 1, packing, [size > 0 for size in sizes])
    made: dict[str, Order] = {
        "neox": NeoxOrder(described, 30, 1),
        "epoch": EpochOrder(described, 1),
        "stored": StoredOrder(described),
    }
    order = made[kind]
    stop = min(25, order.num_samples)
    for document in range(9):
        expected = [i for i in range(stop) if any(segment.document == document for segment in order.segments(i))]
        assert order.samples_of(document, stop).tolist() == expected
