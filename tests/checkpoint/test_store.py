"""Checkpoints are complete or absent, whole or refused, and load in any layout."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from neox_native.checkpoint import files, store
from neox_native.errors import UserError
from neox_native.hashes import as_text, tensor_hash
from neox_native.launch import Ranks
from tests.checkpoint.states import NAMES, full, state, wrong
from tests.ranks import run_ranks

LAYOUTS = [(1, 1, 1), (1, 3, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2)]


def save(directory: Path, step: int = 100, layout: tuple[int, int, int] = (1, 1, 1)) -> Path:
    """Save the names' numbers on forked ranks; returns the checkpoint's folder."""
    def rank() -> None:
        store.save(directory, step, state(*layout), {"step": step, "note": "x"}, Ranks())

    run_ranks(layout[0] * layout[1] * layout[2], rank)
    return files.step_folder(directory, step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved"), layout=(2, 2, 2))


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def shard(path: Path) -> Path:
    return sorted(path.glob("*.distcp"))[1]


def flip_one_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_only_the_finished_folder_is_left(saved: Path) -> None:
    assert [path.name for path in saved.parent.iterdir()] == ["step_000000100"]
    assert set(files.read_manifest(saved)) == {path.name for path in saved.iterdir()} - {files.MANIFEST}
    assert files.read_metadata(saved) == {"step": 100, "note": "x"}


def test_hashes_are_those_of_the_whole_tensors_whatever_the_layout(saved: Path, tmp_path: Path) -> None:
    """The names of generators alone tell a layout."""
    expected = {name: as_text(int(tensor_hash(full(name)))) for name in NAMES} | {"optimizer.step": as_text(int(tensor_hash(torch.tensor(7.0))))}
    for path in saved, save(tmp_path, layout=(1, 3, 1)):
        told = files.read_hashes(path)
        assert told and {name: each for name, each in told.items() if not name.startswith("rng.")} == expected
    flip_one_bit(path / files.HASHES)
    with pytest.raises(UserError, match=f"{files.HASHES} is damaged"):
        files.read_hashes(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_loads_bitwise_in_any_layout(saved: Path, layout: tuple[int, int, int]) -> None:
    def rank() -> list[str]:
        loaded = state(*layout, filled=False)
        metadata = store.load(saved, loaded, Ranks())
        assert metadata["step"] == 100
        # Generators belong to a rank of one layout: here and in the checkpoint they may bear other names.
        return [name for name in wrong(loaded, state(*layout)) if not name.startswith("rng.")]

    assert run_ranks(layout[0] * layout[1] * layout[2], rank) == [[]] * (layout[0] * layout[1] * layout[2])


def test_generator_states_return_to_their_ranks(saved: Path) -> None:
    def rank() -> list[str]:
        loaded = state(2, 2, 2, filled=False)
        store.load(saved, loaded, Ranks())
        return wrong(loaded, state(2, 2, 2))

    assert run_ranks(8, rank) == [[]] * 8


def test_one_process_without_a_process_group_loads_the_weights_alone(saved: Path) -> None:
    weights = {"model.layers.1.dense.bias": torch.zeros(8)}
    with pytest.raises(UserError, match=r"the model has no model.layers.0.query_key_value.weight"):
        store.load(saved, weights, Ranks(), only="model.")
    weights = {name: torch.zeros(shape) for name, shape in {
        "model.layers.0.query_key_value.weight": (24, 8), "model.layers.1.dense.weight": (8, 24),
        "model.layers.1.dense.bias": (8,), "model.layers.2.tiny": (3,), "model.layers.3.odd": (10, 6),
    }.items()}
    store.load(saved, weights, Ranks(), only="model.")
    assert all(bool(value.abs().sum() > 0) for value in weights.values())


def test_another_architecture_is_refused_with_names_and_shapes(saved: Path) -> None:
    weights = {"model.layers.2.tiny": torch.zeros(4), "model.new": torch.zeros(1)}
    with pytest.raises(UserError) as refusal:
        store.load(saved, weights, Ranks(), only="model.")
    assert "the checkpoint has no model.new" in str(refusal.value)
    assert "model.layers.2.tiny (3,) in the checkpoint, (4,) in the model" in str(refusal.value)


def test_truncated_shard_is_named(copy: Path) -> None:
    file = shard(copy)
    file.write_bytes(file.read_bytes()[:-1])
    size = file.stat().st_size
    assert store.find_damage(copy, Ranks()) == [f"{file} has {size} bytes, its manifest says {size + 1}"]


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "shard"])
def test_flipped_bit_is_found_in_every_file(copy: Path, name: str) -> None:
    file = shard(copy) if name == "shard" else copy / name
    flip_one_bit(file)
    (complaint,) = store.find_damage(copy, Ranks())
    assert complaint.startswith(f"{file} is damaged: its crc32 is")


def test_missing_manifest_and_missing_shard_are_named(copy: Path) -> None:
    shard(copy).unlink()
    assert "is missing" in store.find_damage(copy, Ranks())[0]
    (copy / files.MANIFEST).unlink()
    missing = f"{copy / files.MANIFEST} is missing: this is not a complete checkpoint"
    assert store.find_damage(copy, Ranks()) == [missing]


def test_damaged_checkpoint_is_reported_and_skipped_for_the_one_before(copy: Path) -> None:
    newer = Path(shutil.copytree(copy, files.step_folder(copy.parent, 200)))
    shutil.copytree(copy, copy.parent / "step_000000300.tmp-0123")
    flip_one_bit(shard(newer))

    def rank() -> tuple[str, list[str]]:
        reports: list[str] = []
        return str(store.newest(copy.parent, Ranks(reports.append))), reports

    (first, reports), (second, silence) = run_ranks(2, rank)
    assert first == second == str(copy) and silence == []
    assert len(reports) == 1 and str(shard(newer)) in reports[0]
    with pytest.raises(UserError, match="is damaged"):
        store.load(newer, {}, Ranks())


def test_nothing_to_resume_is_none(tmp_path: Path) -> None:
    assert store.newest(tmp_path / "absent", Ranks()) is None


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store.save(tmp_path, 5, {"a": torch.zeros(3)}, {"step": 5}, Ranks())
    path = store.save(tmp_path, 5, {"a": torch.ones(3)}, {"step": 5}, Ranks())
    loaded = {"a": torch.zeros(3)}
    store.load(path, loaded, Ranks())
    assert loaded["a"].tolist() == [1, 1, 1] and [p.name for p in tmp_path.iterdir()] == ["step_000000005"]


def test_full_disk_on_one_rank_is_one_sentence_on_all_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rank() -> str:
        import torch.distributed as dist

        if dist.get_rank() == 1:
            def full_disk(*_: object) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")
            monkeypatch.setattr(files.ChecksumStream, "write", full_disk)
        with pytest.raises(UserError) as refusal:
            store.save(tmp_path, 100, state(1, 2, 1), {}, Ranks())
        return str(refusal.value)

    first, second = run_ranks(2, rank)
    assert first == second and "rank 1" in first and "No space left on device" in first
    assert list(tmp_path.iterdir()) == []


def test_failing_write_of_the_kernel_is_one_sentence_too(tmp_path: Path) -> None:
    def rank() -> str:
        import torch.distributed as dist

        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            with pytest.raises(UserError) as refusal:
                store.save(tmp_path, 100, state(1, 2, 1) | {f"own.{dist.get_rank()}": torch.zeros(10000)}, {}, Ranks())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return str(refusal.value)

    first, second = run_ranks(2, rank)
    assert first == second and "rank 1" in first and "too large" in first
    assert list(tmp_path.iterdir()) == []


def test_every_file_is_whole_when_it_is_flushed_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: dict[str, int] = {}
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        flushed[Path(os.readlink(f"/proc/self/fd/{descriptor}")).name] = os.fstat(descriptor).st_size
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    path = store.save(tmp_path, 1, {"a": torch.ones(3), "b": torch.ones(1 << 19)}, {"step": 1}, Ranks())
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    sizes[".metadata.tmp"] = sizes.pop(".metadata")  # DCP renames its index
    assert {name: flushed.get(name) for name in sizes} == sizes


def test_plain_dcp_reads_the_format(saved: Path) -> None:
    weights = {"model.layers.1.dense.bias": torch.zeros(8)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(weights, checkpoint_id=saved)
    assert torch.equal(weights["model.layers.1.dense.bias"], full("model.layers.1.dense.bias"))


def test_metadata_is_readable_json(saved: Path) -> None:
    assert json.loads((saved / files.METADATA).read_text())["step"] == 100
