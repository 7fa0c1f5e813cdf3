"""Which steps are saved, and which checkpoints may go."""

from __future__ import annotations

import pytest

from neox_native.checkpoint.retention import should_save, to_delete
from neox_native.config.schema import Checkpoint


def saved(config: Checkpoint, total: int) -> list[int]:
    return [step for step in range(total + 1) if should_save(step, config, total)]


def test_pythia_saves_its_154_checkpoints() -> None:
    steps = saved(Checkpoint(save_steps="pythia"), 143_000)
    assert len(steps) == 154
    assert steps[:13] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000]


def test_last_step_is_always_saved() -> None:
    assert saved(Checkpoint(), 7) == [7]
    assert saved(Checkpoint(save_every=3), 7) == [3, 6, 7]
    assert saved(Checkpoint(save_steps=[0, 2], save_every=5), 7) == [0, 2, 5, 7]


def test_newest_checkpoints_and_milestones_stay() -> None:
    steps = [100, 200, 300, 400, 500]
    assert to_delete(steps, keep_last=2, keep_every=0) == [100, 200, 300]
    assert to_delete(steps, keep_last=2, keep_every=200) == [100, 300]
    assert to_delete(steps, keep_last=0, keep_every=200) == []


@pytest.mark.parametrize("keep_last", [0, 1, 5])
def test_newest_is_never_deleted(keep_last: int) -> None:
    assert 500 not in to_delete([500, 100], keep_last, keep_every=0)
    assert to_delete([], keep_last, keep_every=0) == []
