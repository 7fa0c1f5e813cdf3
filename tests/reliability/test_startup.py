"""Ranks that were started differently, and axes that do not communicate, are named before the first step."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

from neox_native.config.schema import Parallel
from neox_native.errors import UserError
from neox_native.launch import Ranks
from neox_native.mesh import Mesh, build_mesh
from neox_native.reliability.startup import check_agreement, check_axes, code_version, describe_mesh
from neox_native.reliability.watchdog import job_store
from tests.ranks import run_ranks


def mesh(pp: int, dp: int, tp: int) -> Mesh:
    return build_mesh(Parallel(pp=pp, dp=dp, tp=tp), torch.device("cpu"))


def test_rank_with_another_config_is_named_on_all_ranks() -> None:
    def rank() -> str:
        size = "64" if dist.get_rank() == 2 else "32"
        with pytest.raises(UserError) as refusal:
            check_agreement({"training.global_batch_size": size, "code": code_version()}, Ranks())
        return str(refusal.value)

    sentences = run_ranks(3, rank)
    assert len(set(sentences)) == 1
    assert "Rank 2 on host" in sentences[0] and "training.global_batch_size is 64 there, 32 on rank 0" in sentences[0]


def test_equal_ranks_agree_and_learn_the_hosts() -> None:
    hosts = run_ranks(2, lambda: check_agreement({"code": code_version()}, Ranks()))
    assert hosts[0] == hosts[1] and len(hosts[0]) == 2


def test_axes_that_work_pass() -> None:
    def rank() -> str:
        found = mesh(2, 1, 2)
        check_axes(found, ["a", "a", "b", "b"], job_store(), limit_seconds=20)
        return describe_mesh(found, ["a", "a", "b", "b"])

    assert run_ranks(4, rank)[0] == (
        "mesh pp 2 x dp 1 x tp 2 = 4 ranks on 2 hosts\n"
        "  pp 0 dp 0: tp ranks [0, 1] on a\n"
        "  pp 1 dp 0: tp ranks [2, 3] on b"
    )


def test_rank_that_does_not_answer_is_named_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    others_are_done = "done"

    def rank() -> str:
        found, store = mesh(1, 3, 1), job_store()
        if dist.get_rank() == 2:
            while not store.check([f"{others_are_done}0", f"{others_are_done}1"]):
                threading.Event().wait(0.02)
            return ""
        import neox_native.reliability.startup as startup

        monkeypatch.setattr(startup, "EXTRA_SECONDS", 0.2)
        with pytest.raises(UserError) as refusal:
            check_axes(found, ["a", "b", "c"], store, limit_seconds=0.5)
        store.set(f"{others_are_done}{dist.get_rank()}", "")
        return str(refusal.value)

    first, second, _ = run_ranks(3, rank)
    assert first == second and "rank 2 on c (no answer)" in first and "over the dp axis" in first
    assert "took more than 0.5 s" in first
