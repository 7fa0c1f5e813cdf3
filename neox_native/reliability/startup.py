"""Before the first step: do all ranks run the same thing, and can every axis of the mesh communicate?

A node with a broken network card or another checkout costs a day where it shows up as a hang or a strange loss. Here it
costs a minute and is named.
"""

from __future__ import annotations

import hashlib
import itertools
import socket
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from neox_native.errors import UserError
from neox_native.launch import Ranks
from neox_native.mesh import Mesh
from neox_native.units import counted

EXTRA_SECONDS = 5.0
"""Ranks whose collective fails late are still heard."""


def code_version() -> str:
    """Hash of this package's sources and torch's version: equal on two machines only if they run the same code."""
    return f"{code_hash()}, torch {torch.__version__}"


def code_hash() -> str:
    """Hash of this package's sources, 12 hex digits."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def check_agreement(facts: dict[str, str], ranks: Ranks) -> list[str]:
    """Raise the same `UserError` on all ranks where they were started with different facts; returns the ranks' host
    names.

    Args:
        facts: what must be equal: each setting by dotted name, the data's fingerprint, `code_version()`.
    """
    everyone = ranks.gather((socket.gethostname(), facts))
    _, expected = everyone[0]
    for rank, (host, found) in enumerate(everyone):
        wrong = sorted(name for name in set(expected) | set(found) if expected.get(name) != found.get(name))
        if wrong:
            told = [f"{name} is {found.get(name)} there, {expected.get(name)} on rank 0" for name in wrong[:5]]
            where = f"Rank {rank} on host {host} was started differently"
            raise UserError(f"{where}: {'; '.join(told)}. Use one command for all ranks.")
    return [host for host, _ in everyone]


def check_axes(mesh: Mesh, hosts: list[str], store: dist.Store, limit_seconds: float = 60.0) -> None:
    """One all-reduce over each axis of the mesh and one over the world, each within `limit_seconds`.

    The verdicts travel through the store, which works where a collective does not.

    Raises:
        UserError: the same on all ranks that still answer; it names ranks and hosts.
    """
    store = dist.PrefixStore("startup", store)
    axes: dict[str, dist.ProcessGroup | None] = {name: axis.group for name, axis in mesh.named.items()}
    for axis, group in [*axes.items(), ("world", None)]:
        members = dist.get_process_group_ranks(group)
        if len(members) == 1:
            continue
        outcome = _timed_all_reduce(group, mesh.whole.device_type, len(members), limit_seconds)
        store.set(f"{axis}/{dist.get_rank()}", outcome)
        outcomes = _collect(store, axis, dist.get_world_size(), limit_seconds)
        failed = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome != "ok"}
        if failed:
            raise UserError(_verdict(axis, failed, hosts, limit_seconds))


def _timed_all_reduce(group: dist.ProcessGroup | None, device_type: str, size: int, limit_seconds: float) -> str:
    """ "ok", or what went wrong. The collective runs in a thread, because making a connection may block for good."""
    outcome = []
    device = torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")

    def all_reduce() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            count = torch.ones(1, device=device)
            dist.all_reduce(count, group=group)
            outcome.append("ok" if count.item() == size else f"the sum over {size} ones was {count.item()}")
        except Exception as error:
            outcome.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")

    thread = threading.Thread(target=all_reduce, name="startup check", daemon=True)
    thread.start()
    thread.join(limit_seconds)
    return outcome[0] if outcome else f"not finished in {limit_seconds:g} s"


def _collect(store: dist.Store, axis: str, world_size: int, limit_seconds: float) -> list[str]:
    """The outcomes of all ranks; ranks that say nothing have a little longer than the collective had."""
    deadline = time.monotonic() + limit_seconds + EXTRA_SECONDS
    keys = [f"{axis}/{rank}" for rank in range(world_size)]
    while time.monotonic() < deadline and not store.check(keys):
        time.sleep(0.01)
    return [store.get(key).decode() if store.check([key]) else "no answer" for key in keys]


def _verdict(axis: str, failed: dict[int, str], hosts: list[str], limit_seconds: float) -> str:
    silent = [rank for rank, outcome in failed.items() if outcome == "no answer"]
    suspects = silent or list(failed)
    named = ", ".join(f"rank {rank} on {hosts[rank]} ({failed[rank]})" for rank in suspects[:8])
    return (
        f"The start-up all-reduce over the {axis} axis failed or took more than {limit_seconds:g} s: {named}. "
        "Take these hosts out, or look at their network and GPUs."
    )


def describe_mesh(mesh: Mesh, hosts: list[str]) -> str:
    """The mesh as a table: one line per (pp, dp) with its tp ranks and their hosts."""
    names, everyone = list(mesh.place), mesh.whole.mesh
    lines = [f"mesh {mesh.layout} = {counted(everyone.numel(), 'rank')} on {counted(len(set(hosts)), 'host')}"]
    for place in itertools.product(*(range(size) for size in everyone.shape[:-1])):
        ranks = everyone[place].tolist()
        at = " ".join(f"{name} {number}" for name, number in zip(names, place))
        on = sorted({hosts[rank] for rank in ranks})
        lines.append(f"  {at}: {names[-1]} ranks {ranks} on {', '.join(on)}")
    return "\n".join(lines)
