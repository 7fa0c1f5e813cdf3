"""A checkpoint from a stranger cannot run code here."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from neox_native.checkpoint import files, safe, store
from neox_native.config.schema import Config
from neox_native.errors import UserError
from neox_native.launch import Ranks
from neox_native.train import fits


class Hostile:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return store.save(tmp_path, 1, {"model.a": torch.ones(3)}, {"step": 1}, Ranks())


def rewrite(file: Path, data: bytes) -> None:
    """Replace a file as an attacker would: with a manifest that agrees."""
    file.write_bytes(data)
    records = files.read_manifest(file.parent)
    records[file.name] = {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    (file.parent / files.MANIFEST).write_text(json.dumps({"files": records}))


def test_hostile_index_is_refused_and_does_not_run(path: Path, tmp_path: Path) -> None:
    rewrite(path / ".metadata", pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"\.metadata is refused: it asks for posix.system"):
        store.load(path, {"model.a": torch.zeros(3)}, Ranks())
    assert not (tmp_path / "ran").exists()


def test_hostile_shard_is_refused_and_does_not_run(path: Path, tmp_path: Path) -> None:
    (shard,) = path.glob("*.distcp")
    stream = io.BytesIO()
    torch.save(Hostile(tmp_path / "ran"), stream)
    index = safe.read_index(path)
    for place in index.storage_data.values():
        place.length = len(stream.getvalue())
    rewrite(path / ".metadata", pickle.dumps(index))
    rewrite(shard, stream.getvalue())
    with pytest.raises(UserError, match="a shard of .* is refused: it holds objects other than tensors"):
        store.load(path, {"model.a": torch.zeros(3)}, Ranks())
    assert not (tmp_path / "ran").exists()


def test_pickled_object_in_place_of_a_tensor_is_refused(path: Path) -> None:
    index = safe.read_index(path)
    index.state_dict_metadata["model.a"] = BytesStorageMetadata()
    rewrite(path / ".metadata", pickle.dumps(index))
    with pytest.raises(UserError, match=r"model.a \(a pickled object\) in the checkpoint"):
        store.load(path, {"model.a": torch.zeros(3)}, Ranks())


def test_index_may_not_point_outside_the_checkpoint(path: Path) -> None:
    index = safe.read_index(path)
    for place in index.storage_data.values():
        place.relative_path = "../secret"
    rewrite(path / ".metadata", pickle.dumps(index))
    with pytest.raises(UserError, match=r"points at ../secret"):
        safe.read_index(path)


def no_place(index: Metadata) -> None:
    index.storage_data = dict.fromkeys(index.storage_data, "__0_0.distcp")


def no_offset(index: Metadata) -> None:
    for place in index.storage_data.values():
        del place.offset


def no_dict(index: Metadata) -> None:
    index.state_dict_metadata = ["model.a"]


def no_entry(index: Metadata) -> None:
    index.state_dict_metadata["model.a"] = 3


def no_size(index: Metadata) -> None:
    index.state_dict_metadata["model.a"].size = "large"


def no_box(index: Metadata) -> None:
    index.state_dict_metadata["model.a"].chunks = [()]


def lost_part(index: Metadata) -> None:
    index.storage_data.clear()


def no_fields(index: Metadata) -> None:
    vars(index).clear()


@pytest.mark.parametrize(
    "change", [no_place, no_offset, no_dict, no_entry, no_size, no_box, lost_part, no_fields], ids=lambda f: f.__name__
)
def test_index_of_other_types_than_dcp_writes_is_refused_in_a_sentence(path: Path, change: Callable) -> None:
    index = safe.read_index(path)
    change(index)
    rewrite(path / ".metadata", pickle.dumps(index))
    with pytest.raises(UserError, match=r"\.metadata is refused"):
        store.load(path, {"model.a": torch.zeros(3)}, Ranks())


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b"[" * 200_000, b'{"step": 1e999}', b'{"step": NaN}'])
def test_metadata_that_is_no_json_object_is_refused(path: Path, content: bytes) -> None:
    rewrite(path / files.METADATA, content)
    with pytest.raises(UserError, match="metadata.json is refused: it is not (a JSON object|UTF-8 text)"):
        files.read_metadata(path)


def test_metadata_without_what_a_run_needs_is_refused_by_name() -> None:
    config = Config()
    whole = fits.metadata(config, 3, 24, {"order": "epoch"}, {})
    fits.check_fits(whole, config, {"order": "epoch"}, {})
    for missing in "step", "consumed_samples", "data", "layout":
        with pytest.raises(UserError, match=f"does not tell {missing}, which a run needs"):
            fits.check_fits({name: value for name, value in whole.items() if name != missing}, config, {"order": "epoch"}, {})
    for told in {}, {"config": 3}, {"config": {}}, {"model": None}:
        with pytest.raises(UserError, match="does not describe its model"):
            fits.config_of(told)


def test_metadata_of_other_types_or_out_of_range_is_refused_by_name() -> None:
    config = Config()
    whole = fits.metadata(config, 3, 24, {}, {})
    for section, changes, sentence in (
        ("model", {"num_layers": 10**7}, "model.num_layers = 10000000 must be 10,000 or less"),
        ("model", {"num_layers": "6"}, "model.num_layers = '6' must be a whole number"),
        ("model", {"num_heads": 7}, "model.num_heads = 7 does not divide"),
        ("run", {"seed": [1]}, r"run.seed = \[1\] must be a whole number"),
        ("data", 3, "its section data is no table"),
    ):
        told = whole["config"][section] | changes if isinstance(changes, dict) else changes
        with pytest.raises(UserError, match=sentence):
            fits.config_of(whole | {"config": whole["config"] | {section: told}})
    newer = whole | {"config": whole["config"] | {"model": whole["config"]["model"] | {"unheard_of": 1}}}
    assert fits.config_of(newer) == fits.config_of(whole) == config
    for name, value in ("step", True), ("consumed_samples", -1), ("step", 3.0):
        with pytest.raises(UserError, match=f"does not tell {name}"):
            fits.check_fits(whole | {name: value}, config, {}, {})


def test_tensor_with_a_missing_part_is_refused(path: Path) -> None:
    index = safe.read_index(path)
    index.state_dict_metadata["model.a"].chunks.clear()
    rewrite(path / ".metadata", pickle.dumps(index))
    with pytest.raises(UserError, match="parts are missing of model.a"):
        store.load(path, {"model.a": torch.zeros(3)}, Ranks())


def test_plain_dcps_index_is_read_as_pickle_reads_it(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="single process"):
        state = {"a": torch.ones(2), "b": {"c": torch.ones(2, dtype=torch.bfloat16)}}
        dcp.save(state, checkpoint_id=tmp_path / "plain")
    data = (tmp_path / "plain" / ".metadata").read_bytes()
    found, expected = safe.parse_index(data, {"__0_0.distcp": {"bytes": 1 << 40}}), pickle.loads(data)
    assert found.state_dict_metadata == expected.state_dict_metadata and set(found.state_dict_metadata) == {"a", "b.c"}
    assert found.storage_data == expected.storage_data


def text(word: str) -> bytes:
    return b"\x8c" + bytes([len(word)]) + word.encode()


POSIX_PATH = text("pathlib") + text("PosixPath") + b"\x93"
HOSTILE = {
    "an attribute of a class": POSIX_PATH + b"}" + text("__fspath__") + text("torch") + text("Size") + b"\x93sb.",
    "a number of the memo": b"Nr\xff\xff\xff\x3f.",
    "a key of nested tuples": b"})" + b"\x94h" + b"\x00\x86\x94" + b"".join(b"h%c\x86\x94" % n for n in range(1, 60)) + b"Ns.",
    "marks in marks": b"(" * 100_000,
    "tuples in tuples": b")" + b"\x85" * 20_000 + b".",
    "a huge number": b"\x8a\xff" + b"\x7f" * 255 + b".",
    "a text that ends too early": b"X\xff\xff\xff\xff",
    "nothing": b"",
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE.keys())
def test_an_index_that_attacks_the_reader_is_refused_at_once(path: Path, program: bytes) -> None:
    rewrite(path / ".metadata", b"\x80\x04" + program)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"\.metadata is refused"):
            safe.read_index(path)
        assert tracemalloc.get_traced_memory()[1] < (1 << 20) + 200 * len(program)
    finally:
        tracemalloc.stop()
    assert "__fspath__" not in vars(type(path)) and os.fspath(path) == str(path)


@pytest.mark.parametrize("word", [b"\xed\xa0\x80", b"\x1b[2J"], ids=["half a character", "a terminal's command"])
def test_a_text_that_is_none_cannot_keep_a_run_from_the_checkpoint_before(path: Path, word: bytes) -> None:
    torn = store.save(path.parent, 2, {"model.a": torch.ones(3)}, {"step": 2}, Ranks())
    rewrite(torn / ".metadata", b"\x80\x04\x8c" + bytes([len(word)]) + word + text("a") + b"\x93.")
    said: list[str] = []
    assert store.newest(path.parent, Ranks(said.append)) == path
    assert said[0].isprintable() and "it asks for \\" in said[0]


def test_a_damaged_index_is_refused_or_read_as_one_of_dcps_own_types(path: Path) -> None:
    state = {f"model.{name}": torch.ones(n, 2, dtype=dtype) for n, (name, dtype) in enumerate(safe.DTYPES.items()) if n < 9}
    whole = (store.save(path.parent, 2, state, {"step": 2}, Ranks()) / ".metadata").read_bytes()
    records = files.read_manifest(path.parent / "step_000000002")
    draw, refused = random.Random("a damaged index"), 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            at, length = draw.randrange(len(data)), draw.randint(0, 12)
            elsewhere = draw.randrange(len(data))
            data[at : at + length] = draw.choice([draw.randbytes(length), data[elsewhere : elsewhere + 12], b""])
        try:
            found = safe.parse_index(bytes(data), records)
        except UserError:
            refused += 1
        else:
            assert safe.parse_index(pickle.dumps(found), records) == found
    assert 300 < refused < 600
