"""Saving in the background, deleting, exporting, and finding where to start."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch

from neox_native.checkpoint import files, saver, store
from neox_native.checkpoint.resume import Start, find_start, tidy
from neox_native.config.schema import Checkpoint
from neox_native.errors import UserError
from neox_native.launch import Ranks
from tests.checkpoint.states import full, state, wrong
from tests.ranks import run_ranks

BACKGROUND = Checkpoint(async_=True)


def one_tensor(value: float) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((3,), value), "optimizer.a": torch.full((3,), value)}


def loaded(path: Path) -> list[float]:
    found = one_tensor(0.0)
    store.load(path, found, Ranks())
    return found["model.a"].tolist()


def steps(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def flip(path: Path) -> Path:
    """Damage the first shard of a checkpoint; returns the shard."""
    file = sorted(path.glob("*.distcp"))[0]
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    return file


def test_background_save_holds_the_state_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()
    write = store.save

    def slow(*args: object) -> Path:
        may_write.wait()
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "save", slow)
    background = saver.Saver(tmp_path, BACKGROUND)
    live = one_tensor(1.0)
    background.save(1, live, {"step": 1})
    # Training goes on while nothing has been written yet.
    live["model.a"].fill_(2.0)
    assert steps(tmp_path) == [] and background.reports() == []
    may_write.set()
    background.save(2, live, {"step": 2})
    (first,) = background.reports()
    assert first.step == 1 and first.stall_seconds <= first.total_seconds and first.size_bytes > 0
    background.wait()
    assert loaded(files.step_folder(tmp_path, 1)) == [1, 1, 1]
    assert loaded(files.step_folder(tmp_path, 2)) == [2, 2, 2]


def test_background_save_of_several_ranks_beside_other_collectives(tmp_path: Path) -> None:
    def rank() -> list[str]:
        import torch.distributed as dist

        background = saver.Saver(tmp_path, BACKGROUND)
        live = state(1, 2, 2)
        for step in (1, 2, 3):
            background.save(step, live, {"step": step})
            for _ in range(20):
                dist.all_reduce(torch.ones(10))
        background.wait()
        found = state(1, 2, 2, filled=False)
        store.load(files.step_folder(tmp_path, 3), found, Ranks())
        return wrong(found, state(1, 2, 2))

    assert run_ranks(4, rank) == [[]] * 4
    assert steps(tmp_path) == [f"step_{step:09d}" for step in (1, 2, 3)]


def test_copies_are_written_once_and_shared_out() -> None:
    def rank() -> list[str]:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))
        copies = {f"copy{n}": DTensor.from_local(torch.ones(2), mesh, [Replicate(), Replicate()]) for n in range(16)}
        halves = {"half": DTensor.from_local(torch.ones(2), mesh, [Shard(0), Replicate()])}
        dist.barrier()  # who leaves first breaks the connections that others are still making
        return sorted(store.own_share({**copies, **halves, "plain": torch.ones(1)}))

    shares = run_ranks(4, rank)
    written = [name for share in shares for name in share if name.startswith("copy")]
    assert sorted(written) == sorted(f"copy{n}" for n in range(16)) and all(len(share) < 12 for share in shares)
    assert sum("half" in share for share in shares) == 2 and all("plain" in share for share in shares)


def test_full_disk_in_the_background_is_raised_on_all_ranks_by_the_next_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rank() -> str:
        import torch.distributed as dist

        if dist.get_rank() == 1:
            def full_disk(*_: object) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")
            monkeypatch.setattr(files.ChecksumStream, "write", full_disk)
        background = saver.Saver(tmp_path, BACKGROUND)
        background.save(1, state(1, 2, 1), {})
        with pytest.raises(UserError) as refusal:
            background.wait()
        return str(refusal.value)

    first, second = run_ranks(2, rank)
    assert first == second and "rank 1" in first and "No space left" in first
    assert steps(tmp_path) == []


def test_rank_that_does_not_see_the_new_folder_yet_reports_what_the_first_one_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rank() -> tuple[int, tuple[int, ...]]:
        import torch.distributed as dist

        if dist.get_rank() == 1:
            monkeypatch.setattr(files, "read_manifest", lambda path: (_ for _ in ()).throw(UserError("not there yet")))
        keeper = saver.Saver(tmp_path, Checkpoint(keep_last=1))
        for step in (1, 2):
            keeper.save(step, state(1, 2, 1), {})
        report = keeper.reports()[-1]
        return report.size_bytes, report.deleted

    first, second = run_ranks(2, rank)
    assert first == second and first[0] > 0 and first[1] == (1,)


@pytest.mark.parametrize("async_", [False, True])
def test_old_checkpoints_make_way_after_the_new_one_is_complete(tmp_path: Path, async_: bool) -> None:
    keeper = saver.Saver(tmp_path, Checkpoint(async_=async_, keep_last=2, keep_every=20))
    for step in (10, 20, 30, 40, 50):
        keeper.save(step, one_tensor(step), {"step": step})
    keeper.wait()
    assert steps(tmp_path) == [f"step_{step:09d}" for step in (20, 40, 50)]
    reports = keeper.reports()
    assert [report.deleted for report in reports] == [(), (), (10,), (), (30,)]
    assert "step 30: saved 4." in str(reports[2]) and " KiB in " in str(reports[2]) and "deleted steps 10" in str(reports[2])
    assert keeper.last_step == 50


def test_damaged_later_checkpoint_does_not_cost_the_newest_whole_one(tmp_path: Path) -> None:
    keeper = saver.Saver(tmp_path, Checkpoint(keep_last=1))
    flip(store.save(tmp_path, 200, one_tensor(2.0), {}, Ranks()))
    keeper.save(100, one_tensor(1.0), {})
    keeper.save(150, one_tensor(1.5), {})
    assert steps(tmp_path) == ["step_000000150", "step_000000200"]


def test_nothing_makes_way_while_updates_are_skipped(tmp_path: Path) -> None:
    keeper = saver.Saver(tmp_path, Checkpoint(keep_last=2))
    for step in range(1, 6):
        keeper.save(step, one_tensor(step), {}, keep_all=step in (3, 4))
        assert len(steps(tmp_path)) == {1: 1, 2: 2, 3: 3, 4: 4, 5: 2}[step]


def test_checkpoint_that_the_start_passed_over_is_not_counted_among_those_kept(tmp_path: Path) -> None:
    for step in (20, 30, 33):
        store.save(tmp_path, step, one_tensor(step), {}, Ranks())
    flip(files.step_folder(tmp_path, 33))
    keeper = saver.Saver(tmp_path, Checkpoint(keep_last=2))
    keeper.pass_over(30)
    keeper.save(40, one_tensor(40.0), {})
    assert steps(tmp_path) == [f"step_{step:09d}" for step in (30, 33, 40)]
    keeper.save(33, one_tensor(33.0), {})  # a run that was rewound comes by again
    assert steps(tmp_path) == [f"step_{step:09d}" for step in (30, 33, 40)]
    keeper.save(50, one_tensor(50.0), {})
    assert steps(tmp_path) == [f"step_{step:09d}" for step in (40, 50)]


def test_checkpoint_that_lacks_a_file_is_not_counted_among_those_kept(tmp_path: Path) -> None:
    keeper = saver.Saver(tmp_path, Checkpoint(keep_last=2))
    for step in (1, 2):
        keeper.save(step, one_tensor(step), {})
    next(files.step_folder(tmp_path, 2).glob("*.distcp")).unlink()
    keeper.save(3, one_tensor(3.0), {})
    assert steps(tmp_path) == [f"step_{step:09d}" for step in (1, 2, 3)]


def test_old_checkpoint_that_cannot_be_deleted_does_not_cost_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = saver.Saver(tmp_path, Checkpoint(keep_last=1))
    keeper.save(1, one_tensor(1.0), {})
    rename = Path.rename

    def kept(self: Path, target: Path) -> Path:
        if self.name == "step_000000001":
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", kept)
    keeper.save(2, one_tensor(2.0), {})
    assert steps(tmp_path) == ["step_000000001", "step_000000002"]
    assert "could not delete step 1: Permission denied" in str(keeper.reports()[-1])


def test_second_failure_in_the_background_is_raised_and_the_first_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    background, broken = saver.Saver(tmp_path, BACKGROUND), threading.Event()
    write = store.save

    def failing(*arguments: object) -> Path:
        if broken.is_set():
            raise UserError("No space left on device")
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "save", failing)
    for _ in range(2):  # a success in between forgives
        broken.set()
        background.save(1, one_tensor(1.0), {})
        assert background.settle() and background.last_step is None and not background.settle()
        assert "No space left on device; the next save tries again" in str(background.reports()[-1])
        broken.clear()
        background.save(2, one_tensor(2.0), {})
        assert not background.settle() and background.last_step == 2
    broken.set()
    background.save(3, one_tensor(3.0), {})
    background.save(4, one_tensor(4.0), {})
    with pytest.raises(UserError, match="No space left"):
        background.save(5, one_tensor(5.0), {})
    assert steps(tmp_path) == ["step_000000002"]


def test_failed_save_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = saver.Saver(tmp_path, Checkpoint(keep_last=1))
    keeper.save(1, one_tensor(1.0), {})
    monkeypatch.setattr(files, "write_json", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(UserError, match="No space left"):
        keeper.save(2, one_tensor(2.0), {})
    assert steps(tmp_path) == ["step_000000001"]


def test_export_holds_the_weights_alone_in_the_published_type(tmp_path: Path) -> None:
    exporter = saver.Saver(tmp_path, Checkpoint(export="bf16"))
    path = exporter.export(tmp_path / "weights", one_tensor(1.5), {"step": 9})
    assert path is not None and files.read_metadata(path) == {"step": 9}
    weights = {"model.a": torch.zeros(3)}
    store.load(path, weights, Ranks())
    assert weights["model.a"].tolist() == [1.5] * 3
    assert path.joinpath(".metadata").stat().st_size > 0 and not list(tmp_path.glob("*.tmp*"))


def test_exported_shards_are_those_of_the_mesh(tmp_path: Path) -> None:
    def rank() -> None:
        saver.Saver(tmp_path, Checkpoint(export="bf16")).export(tmp_path / "weights", state(1, 2, 2), {})

    run_ranks(4, rank)
    name = "model.layers.3.odd"
    weights = {key: torch.zeros(value.shape, dtype=torch.bfloat16) for key, value in whole().items()}
    store.load(tmp_path / "weights", weights, Ranks())
    assert torch.equal(weights[name], full(name).bfloat16())


def whole() -> dict[str, torch.Tensor]:
    from tests.checkpoint.states import NAMES

    return {name: full(name) for name in NAMES if name.startswith("model.")}


def test_start_is_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    reports: list[str] = []
    ranks = Ranks(reports.append)
    assert find_start(Checkpoint(), tmp_path, ranks) is None
    older = store.save(tmp_path, 1, one_tensor(1.0), {}, ranks)
    newer = store.save(tmp_path, 2, one_tensor(2.0), {}, ranks)
    assert find_start(Checkpoint(), tmp_path, ranks) == Start(newer, weights_only=False)
    assert find_start(Checkpoint(resume="none"), tmp_path, ranks) is None
    shard = flip(newer)
    assert find_start(Checkpoint(), tmp_path, ranks) == Start(older, weights_only=False)
    assert len(reports) == 1 and str(shard) in reports[0]
    with pytest.raises(UserError, match=f"checkpoint.resume = .*{shard.name} is damaged"):
        find_start(Checkpoint(resume=str(newer)), tmp_path, ranks)
    (older / files.MANIFEST).unlink()
    with pytest.raises(UserError, match="None of the 2 checkpoints .* is whole"):
        find_start(Checkpoint(), tmp_path, ranks)


def test_fine_tuning_takes_weights_once_and_then_goes_on_by_itself(tmp_path: Path) -> None:
    ranks = Ranks()
    base = store.save(tmp_path / "base", 7, one_tensor(7.0), {}, ranks)
    config = Checkpoint(initialize_from=str(base))
    assert find_start(config, tmp_path / "tuned", ranks) == Start(base, weights_only=True)
    own = store.save(tmp_path / "tuned", 1, one_tensor(8.0), {}, ranks)
    assert find_start(config, tmp_path / "tuned", ranks) == Start(own, weights_only=False)
    with pytest.raises(UserError, match="initialize_from .* no such folder"):
        find_start(Checkpoint(initialize_from="nowhere"), tmp_path / "new", ranks)


def test_fine_tuning_starts_from_a_run_at_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    reports: list[str] = []
    ranks, run = Ranks(reports.append), Checkpoint(initialize_from=str(tmp_path / "run"))
    older, newer = (store.save(tmp_path / "run" / "checkpoints", step, one_tensor(1.0), {}, ranks) for step in (1, 2))
    for named in tmp_path / "run", tmp_path / "run" / "checkpoints", newer:
        found = find_start(Checkpoint(initialize_from=str(named)), tmp_path / "tuned", ranks)
        assert found == Start(newer, weights_only=True)
    flip(newer)
    assert find_start(run, tmp_path / "tuned", ranks) == Start(older, weights_only=True) and len(reports) == 1
    flip(older)
    with pytest.raises(UserError, match="None of the 2 checkpoints in .* is whole; mend one, or name another"):
        find_start(run, tmp_path / "tuned", ranks)
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match=f"Hugging Face folder; .*convert.py from-hf {tmp_path} CHECKPOINT"):
        find_start(Checkpoint(initialize_from=str(tmp_path)), tmp_path / "tuned", ranks)


def test_leftovers_of_killed_saves_and_exports_go_and_what_was_moved_returns(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    whole_one = store.save(directory, 1, one_tensor(1.0), {}, Ranks())
    exported = store.write(tmp_path / "weights", "Exporting", one_tensor(2.0), {}, Ranks())
    for path in whole_one, exported:
        path.rename(path.with_name(path.name + ".tmp-replaced"))
    for left in "checkpoints/step_000000002.tmp-01", "checkpoints/step_000000003.tmp-deleted", "weights.tmp-23":
        (tmp_path / left).mkdir()
    tidy(tmp_path)
    assert steps(directory) == ["step_000000001"] and steps(tmp_path) == ["checkpoints", "weights"]
    assert loaded(whole_one) == [1, 1, 1] and loaded(exported) == [2, 2, 2]


def test_looking_for_a_start_finds_a_moved_checkpoint_and_deletes_nothing(tmp_path: Path) -> None:
    whole_one = store.save(tmp_path, 1, one_tensor(1.0), {}, Ranks())
    whole_one.rename(tmp_path / "step_000000001.tmp-replaced")
    (tmp_path / "step_000000002.tmp-0123").mkdir()
    assert find_start(Checkpoint(), tmp_path, Ranks()) == Start(whole_one, weights_only=False)
    assert steps(tmp_path) == ["step_000000001", "step_000000002.tmp-0123"]
