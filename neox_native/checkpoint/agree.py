"""The ranks that save and load together: they share what they know and fail together.

A rank that meets a full disk must not leave its peers waiting in a collective. So every piece of local work that can
fail runs inside `Ranks.together`, which ends with a collective: either all ranks go on, or all raise the same
sentence.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from neox_native.errors import UserError, in_words


@dataclass(frozen=True)
class _Failure:
    rank: int
    host: str
    kind: str
    message: str
    of_the_user: bool


class Ranks:
    """All ranks of the job, with a gloo group of their own, or this process alone.

    The own group lets a background thread save while the main thread's collectives go on, and keeps objects off the
    GPU. Creating one is a collective over the world. Object collectives unpickle what the *ranks of this job* send,
    never a file.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, by rank, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Run the body on every rank, then agree on how it went; a collective at the end, whatever happened.

        Where a body raised, every rank raises: `UserError` with the same sentence for a `UserError` or an operating
        system error (a full disk, a missing permission); for a bug, the failing rank's own error and a `RuntimeError`
        elsewhere.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failures = [failure for failure in self.gather(self._describe(error)) if failure is not None]
        if not failures:
            return
        first = failures[0]
        others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        where = f"{doing} failed" + (f" on rank {first.rank}{others}, host {first.host}" if self.size > 1 else "")
        if all(failure.of_the_user for failure in failures):
            raise UserError(f"{where}: {first.message}") from error
        if error is not None:
            raise error
        raise RuntimeError(f"{where}: {first.kind}: {first.message}")

    def _describe(self, error: Exception | None) -> _Failure | None:
        if error is None:
            return None
        message = in_words(error) if isinstance(error, OSError) else str(error)
        of_the_user = isinstance(error, (UserError, OSError))
        return _Failure(self.rank, socket.gethostname(), type(error).__name__, message, of_the_user)
