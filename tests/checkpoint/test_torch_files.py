"""Files of `torch.save` from a stranger take no more time and memory than their size."""

from __future__ import annotations

import io
import random
import zipfile

import numpy as np
import pytest
import torch

from neox_native.checkpoint.torch_files import Piece, look_at
from neox_native.errors import UserError

DOUBLED = b")q\x00" + b"".join(b"h%c\x86q%c" % (number, number + 1) for number in range(60))
"""A tuple of two tuples of two tuples ...: 2^60 leaves, were anybody to hash it."""


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def archive(program: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file of `torch.save` whose pickle is this program."""
    original, stream = zipfile.ZipFile(io.BytesIO(saved(torch.zeros(3)))), io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as new:
        for name in original.namelist():
            new.writestr(name, b"\x80\x02" + program if name.endswith("data.pkl") else original.read(name))
    return stream.getvalue()


@pytest.mark.parametrize(
    "data, sentence",
    [
        (archive(b"}" + DOUBLED + b"K\x01s."), "a key in it is neither a word nor a number"),
        (archive(b"ccollections\nOrderedDict\n]" + DOUBLED + b"K\x01\x86a\x85R."), "OrderedDict of what"),
        (archive(b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + DOUBLED + b"X\x03\x00\x00\x00cpuK\x03tQ."), "where the numbers"),
        (archive(b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R."), r"\(builtins.bytearray\)"),
        (archive(b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85X\x01\x00\x00\x00b\x87R."), "makes a numpy"),
        (archive(b"]r\x00\x00\x00\x7f."), "count its objects one by one"),
        (archive(b"].", zipfile.ZIP_DEFLATED), "no archive as torch.save writes it"),
        (saved(1) + b"!", "no file of torch.save|no archive"),
        (archive(b"].") + archive(b"]."), "no archive as torch.save writes it"),
        (saved(torch.zeros(3))[:-30], "damaged or no file of torch.save"),
        (b"", "no file of torch.save"),
    ],
    ids=[
        "nested key", "nested key of an OrderedDict", "nested name of a storage", "bytes", "array", "memo", "compressed", "behind",
        "two", "short", "empty",
    ],
)  # fmt: skip
def test_what_would_take_for_ever_or_all_memory_is_refused_at_once(data: bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        look_at(io.BytesIO(data))


def test_what_gpt_neox_writes_passes() -> None:
    state = {
        "module": torch.nn.Linear(2, 3).state_dict(), "parameter": torch.nn.Parameter(torch.ones(2)), "half": torch.ones(2).half(),
        "shapes": [{"a": torch.Size([2, 3])}], "np_rng_state": np.random.get_state(), "random_rng_state": random.getstate(),
        "args": {"lr": 1e-4, "layers": (1, 2), 7: None, "on": True, "type": torch.bfloat16}, "sliced": torch.arange(12).view(3, 4)[:, 1],
    }  # fmt: skip
    stream = io.BytesIO(saved(state))
    look_at(stream)
    assert stream.tell() == 0


def test_a_piece_of_a_file_is_a_file_of_its_own() -> None:
    piece = Piece(io.BytesIO(b"before" + saved(torch.arange(5)) + b"behind"), 6, len(saved(torch.arange(5))))
    look_at(piece)
    assert torch.equal(torch.load(piece), torch.arange(5))
