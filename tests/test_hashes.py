"""A tensor's hash sees every element and its place, and does not see how the tensor is cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from neox_native import hashes
from neox_native.hashes import as_text, box_hash, tensor_hash

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_hash_sees_every_element_and_its_place(dtype: torch.dtype) -> None:
    base = torch.arange(1, 13).to(dtype).view(3, 4)
    seen = {int(tensor_hash(tensor)) for tensor in (base, base.flip(0), base.flip(1), base.T, base.flatten(), -base)}
    for place in range(12):
        changed = base.clone().flatten()
        changed[place] += 1
        seen.add(int(tensor_hash(changed.view(3, 4))))
    assert len(seen) == 18


def test_another_hash_is_another_format() -> None:
    """Those in checkpoints are compared with those of today: who changes these also changes `files.HASH_FORMAT`."""
    assert as_text(int(tensor_hash(torch.arange(6.0).view(2, 3)))) == "cb1284921c600000"
    assert as_text(int(tensor_hash(torch.arange(3)))) == "6d71273608124c01"


def test_changes_that_balance_do_not_cancel() -> None:
    """Of neighbours, of a second difference, of four corners, and of two signs: sums with weights that grow evenly miss some."""
    base, seen = torch.ones(6, 8), set[int]()
    for ulps in ({(0, 0): 1, (0, 1): -1}, {(0, 0): 1, (0, 1): -2, (0, 2): 1}, {(1, 1): 1, (1, 3): -1, (3, 1): -1, (3, 3): 1}):
        words = base.clone().view(torch.int32)
        for place, change in ulps.items():
            words[place] += change
        seen.add(int(tensor_hash(words.view(torch.float32))))
    signs = base.clone()
    signs[2, 3] = signs[4, 5] = -1
    seen |= {int(tensor_hash(signs)), int(tensor_hash(base))}
    assert len(seen) == 5


def boxes(tensor: Tensor, *cuts: tuple[int, ...]) -> list[tuple[Tensor, list[int]]]:
    """The tensor cut along each dim at these places, and where each piece begins."""
    edges = [[0, *places, size] for places, size in zip(cuts, tensor.shape, strict=True)]
    found = []
    for spans in itertools.product(*(itertools.pairwise(each) for each in edges)):
        found.append((tensor[tuple(slice(*span) for span in spans)], [start for start, _ in spans]))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_hashes_of_boxes_add_up_to_that_of_the_whole(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(7, 5, 6, generator=generator).mul(100).to(dtype)
    whole = as_text(int(tensor_hash(tensor)))
    for cuts in (((3,), (), ()), ((1, 4, 4), (2,), (3,)), ((), (), (1, 5))):
        assert as_text(sum(int(box_hash(box, offsets)) for box, offsets in boxes(tensor, *cuts))) == whole
    assert int(tensor_hash(torch.empty(0, 4, dtype=dtype))) == 0
    assert len({int(tensor_hash(torch.tensor(each, dtype=dtype))) for each in (0, 1, 3)}) == 3


def test_a_gpu_hashes_in_pieces_what_a_cpu_hashes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, weights = torch.randint(-(2**31), 2**31, (9, 10)).int(), torch.randint(-(2**62), 2**62, (10,))

    class OnGpu(Tensor):
        is_cpu = False

    at_once = hashes._row_sums(matrix, weights)
    with np.errstate(all="raise"):
        expected = [sum(int(x) * int(w) for x, w in zip(row, weights)) % 2**64 for row in matrix]
    assert [each % 2**64 for each in at_once.tolist()] == expected
    for chunk in (1, 25, 1 << 22):
        monkeypatch.setattr(hashes, "_CHUNK", chunk)
        assert hashes._row_sums(matrix.as_subclass(OnGpu), weights).tolist() == at_once.tolist()
