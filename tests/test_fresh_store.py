"""Ranks that are restarted over the launcher's old key-value store do not find what the dead ones left in it."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from neox_native.errors import UserError
from neox_native.launch import Launch, fresh_store, launchers_store


def attempt(store: dist.Store, world_size: int) -> list[bytes]:
    """All ranks meet and rank 0 leaves its address; what each of them reads."""

    def rank(number: int) -> bytes:
        fresh = fresh_store(store.clone(), Launch(number, number, world_size), timedelta(seconds=30))
        if number == 0:
            assert not fresh.check(["address"])
            fresh.set("address", str(id(fresh)))
        return fresh.get("address")

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(rank, reversed(range(world_size))))


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_each_attempt_has_a_part_of_the_store_of_its_own(world_size: int) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    first, second = attempt(store, world_size), attempt(store, world_size)
    assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]


@pytest.mark.parametrize("left_behind", [True, False])
def test_ranks_without_their_first_rank_give_up(left_behind: bool) -> None:
    store = dist.HashStore()
    if left_behind:
        store.set("attempt", "of dead ranks")
    with pytest.raises(UserError, match="Rank 0 did not answer rank 1"):
        fresh_store(store, Launch(1, 1, 2), timedelta(seconds=0.05))


def test_first_rank_names_those_that_do_not_come() -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(UserError, match="Rank 1, 2 of 3 did not start within 0 seconds; look at their nodes"):
        fresh_store(store, Launch(0, 0, 3), timedelta(seconds=0.05))


def test_launcher_that_does_not_answer_is_named_with_a_way_out(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1]), "RANK": "1", "WORLD_SIZE": "2"}
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"did not meet the others at 127.0.0.1:{told['MASTER_PORT']} within 0 seconds"):
            launchers_store(Launch(1, 1, 2), timedelta(seconds=0.2))
