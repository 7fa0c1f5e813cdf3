"""Steps that must not be taken, because a loss or gradient is not finite or the loss leaps; and steps that teach nothing.

[Note: skipped updates] A tensor on the device says whether a step is bad. It is equal on all ranks, because loss and gradient
norm are reduced over all of them, and the optimizer multiplies by it instead of asking the host. So skipping costs no wait
and cannot split the ranks. The host learns of it on the next logged step, or when so many flags are unread that the run may
have to end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from neox_native.config.schema import Training
from neox_native.errors import UserError


@dataclass(frozen=True)
class BadStep:
    """A step whose update was skipped."""

    step: int
    sample_ids: tuple[int, ...]
    in_a_row: int
    """Bad steps up to and with this one."""

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.sample_ids[:16])) + (", ..." if len(self.sample_ids) > 16 else "")
        return f"step {self.step}: update skipped, {self.in_a_row} in a row; sample ids {shown}"


class BadSteps:
    """Keeps the flags of the steps since they were last looked at, and counts how many were bad in a row.

    Args:
        training: the [training] section; `max_bad_steps` in a row are survived, 0 for no limit.
    """

    def __init__(self, training: Training) -> None:
        self.limit = training.max_bad_steps
        self.in_a_row = self.longest = 0
        """Bad steps up to the last one collected, and the most in a row that the last call to `collect` saw."""
        self._pending: list[tuple[int, tuple[int, ...], torch.Tensor]] = []

    def record(self, step: int, sample_ids: tuple[int, ...], bad: torch.Tensor) -> None:
        """Note a step. `bad`: scalar, nonzero where the update was skipped; not read here."""
        self._pending.append((step, sample_ids, bad.detach().reshape(())))

    def may_have_passed_limit(self) -> bool:
        """Whether the unread flags, all of them bad, would end the run. Read then, they show a row of bad steps after
        2 * limit + 1 of them at the latest."""
        return len(self._pending) > self.limit > 0

    def collect(self) -> list[BadStep]:
        """The bad steps since the last call; waits for the device once."""
        if not self._pending:
            return []
        flags = torch.stack([flag.to(torch.float32) for _, _, flag in self._pending]).tolist()
        found, self.longest = [], 0
        for (step, sample_ids, _), flag in zip(self._pending, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if flag else 0
            self.longest = max(self.longest, self.in_a_row)
            if flag:
                found.append(BadStep(step, sample_ids, self.in_a_row))
        self._pending.clear()
        return found

    @property
    def count(self) -> int:
        """Bad steps in a row that still run on, or that end the run: what a checkpoint keeps for `go_on_from`."""
        return self.longest if self.verdict() else self.in_a_row

    def go_on_from(self, count: int) -> None:
        """Count on from a checkpoint's `count`, so that neither a row of bad steps nor a verdict ends with the process."""
        self.in_a_row = self.longest = count

    def verdict(self, older: str = "") -> UserError | None:
        """What ends the run, after its state is saved, or None: there was a time without an update for more than
        `limit` steps, even if the last ones collected were good.

        Args:
            older: the checkpoint before those steps, where there is one.
        """
        if self.limit <= 0 or self.longest <= self.limit:
            return None
        return UserError(
            f"{self.longest} steps in a row had a loss or gradient norm that is not finite, or a spike; "
            f"training.max_bad_steps = {self.limit}. Their updates were skipped, the state is saved, and a restart with the same "
            "settings does not train on: look at the sample ids in events.jsonl, then lower optimizer.lr or change another "
            "setting of the training, or resume from an older checkpoint"
            + (f' (checkpoint.resume = "{older}" is the newest before these steps).' if older else ".")
        )


class EmptySteps:
    """Finds the steps in which no rank had a target. Their loss of 0 means nothing, and their gradient is zero.

    Args:
        group: the ranks that read different rows.
        device: where their collectives run.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self._pending: list[tuple[int, int]] = []

    def record(self, step: int, num_targets: int) -> None:
        """Note a step and how many targets this data rank had in it. No rank is asked yet."""
        self._pending.append((step, num_targets))

    def collect(self) -> list[int]:
        """The empty steps since the last call; a collective of one number per step."""
        if not self._pending:
            return []
        steps, counts = zip(*self._pending)
        totals = torch.tensor(counts, device=self.device)
        dist.all_reduce(totals, group=self.group)
        self._pending.clear()
        return [step for step, total in zip(steps, totals.tolist()) if not total]
