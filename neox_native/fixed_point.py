"""Sums that do not depend on their order: floating-point numbers rounded, each on its own, to multiples of a power of two.

The sum of integers is the same in every order, so it is the same on any number of ranks. What is summed must not depend on
the layout either: gradients and losses of whole microbatches. Rounding happens once before the sum and once after it.

[Note: range and grain] Gradients are summed as int64 multiples of 2^-48. A sum of magnitude 2^-24 or more is then at least as
fine as fp32, whose neighbours there lie 2^-48 apart; AdamW's epsilon, 1e-8, is 2^21 grains. The largest addend is 2^62
grains over the number of addends, so that no sum can wrap: as the gradient of a step's mean loss is a sum of N shares of the
size 1/N, a microbatch's own gradients may reach about 2^14 / (2 * tp) (the 2 are the readers of a tied embedding). Under fp16
all of this is multiplied by the largest power of two in the loss scale, which is exact. On step 100 of the quickstart, where
the median gradient is 4e-5, 0.2% of the sums of 8 microbatches are below 2^-24; 99.9% of all lie within 6e-8 of the exact sum,
relative, where sums in fp32 lie within 1.3e-5.

Everything else is a sum of three limbs, see `limbs`: the gradient's squared norm, losses, metrics. An addend that is not
finite, or that leaves the range, makes the result NaN in every layout; the sum itself has no range that it could leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

GRAIN = 2.0**-48
"""What one unit of an integer gradient stands for, without a loss scale. See [Note: range and grain]."""
HIGH, LOW = 16, 42
"""Binary digits behind the point of a high limb, and further ones of a low limb; as many make a high limb."""
LARGEST = 2.0**26
"""Largest magnitude of an addend in limbs, and what one unit of a top limb stands for."""
LIMBS = 4
"""Integers that a sum of limbs consists of, with the count of addends that do not fit."""
PIECES = {"cpu": 1 << 16, "cuda": 1 << 20}
"""Elements that are converted at a time: temporaries stay in a CPU's cache, and up to 2^20 low limbs add up without a carry."""
MANY = 1024
"""Extremes that are kept until one is made of them."""


class FixedGradients:
    """Turns gradients into integers that add up to the same sum in every order, and their sums back into fp32.

    Args:
        num_addends: largest number of gradients that are summed to one number in a step.
    """

    def __init__(self, num_addends: int, device: torch.device):
        self.piece = PIECES.get(device.type, PIECES["cpu"])
        self.limit = 2.0**62 / (1 << (num_addends - 1).bit_length())
        """Largest addend [grains]."""
        self.extremes = [torch.zeros((), device=device)]
        """Among them is the largest magnitude that the step has met [grains]; NaN once it has met one."""
        self.shift = torch.ones((), device=device)
        """The largest power of two in the step's loss scale; sums are divided by it."""
        self.grains_of_one = 1 / (GRAIN * self.shift)

    def begin(self, loss_scale: Tensor | None) -> None:
        """A step begins, whose gradients are multiplied by `loss_scale`."""
        self.extremes = [torch.zeros_like(self.shift)]
        if loss_scale is not None:
            self.shift = torch.ldexp(torch.ones_like(self.shift), torch.frexp(loss_scale.float()).exponent - 1)
        self.grains_of_one = 1 / (GRAIN * self.shift)

    def collect(self, sums: Tensor, gradient: Tensor, add: bool) -> None:
        """Add a gradient to integers of its shape [n, m], or write it there. Both are taken in pieces of columns."""
        for target, piece in zip(_columns(sums, self.piece), _columns(gradient, self.piece)):
            grains = piece.float() * self.grains_of_one
            self.extremes += torch.aminmax(grains)  # a tenth of the time of a norm
            grains.round_()
            if add:
                target.add_(grains.to(torch.int64))
            else:
                target.copy_(grains)
        if len(self.extremes) > MANY:
            self.extremes = list(torch.aminmax(torch.stack(self.extremes)))

    def settle(self, sums: Tensor) -> None:
        """Turn the integers [n] into fp32 numbers, less the power of two in the loss scale, in the first half of their memory."""
        floats, size = sums.view(torch.float32)[: len(sums)], self.piece
        for start in range(0, len(sums), size):
            # Through fp64: a direct conversion rounds as the kernel likes. The integers behind the piece are not touched.
            floats[start : start + size] = sums[start : start + size].double() * GRAIN

    def faults(self) -> Tensor:
        """1 if an addend of this rank left the range or was not finite, else 0, as an int64 scalar."""
        return _faults(self.extremes, self.limit)


def limbs(tensors: Sequence[Tensor], squared: bool = False, piece: int = PIECES["cpu"]) -> Tensor:
    """The sum of all values, or of their squares, as int64 [4], which adds up with others, over ranks too: top limb, high limb,
    low limb, and a number that is not zero where a value is not finite or larger than `LARGEST`.

    A value is rounded to the nearest multiple of 2^-58: top * 2^26 + high * 2^-16 + low * 2^-58. After a `carry`, 2^20 results
    can be added without another.
    """
    nothing = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    highs, lows, extremes = [nothing], [nothing], [nothing.double()]
    for values in _joined(tensors, piece):
        scaled = values.double()
        scaled = (scaled.square_() if squared else scaled).mul_(2.0**HIGH)
        extremes += torch.aminmax(scaled)
        high = scaled.floor()
        highs.append(high.to(torch.int64).sum())
        lows.append(scaled.sub_(high).mul_(2.0**LOW).round_().to(torch.int64).sum())
    faults = _faults(extremes, LARGEST * 2.0**HIGH).expand(len(highs))
    tops = torch.zeros_like(faults)
    return carry(carry(torch.stack([tops, torch.stack(highs), torch.stack(lows), faults], dim=-1)).sum(dim=0))


def _faults(extremes: Sequence[Tensor], largest: float) -> Tensor:
    """1 if any of them is not finite or larger than `largest`, else 0, as an int64 scalar."""
    return (~(torch.stack(extremes).abs().amax() <= largest)).to(torch.int64)


def _columns(matrix: Tensor, size: int) -> Sequence[Tensor]:
    """Columns of a matrix [n, m], so many that they have `size` elements at most, if they can."""
    return [matrix] if matrix.numel() <= size else matrix.split(max(1, size // len(matrix)), dim=1)


def _joined(tensors: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """The values of all tensors as pieces [1, `size` at most]. Small tensors are joined: each would take as many kernels as a large one."""
    waiting: list[Tensor] = []
    room = size
    for values in (piece for tensor in tensors if tensor.numel() for piece in _columns(tensor.detach().reshape(1, -1), size)):
        if values.numel() > room:
            yield torch.cat(waiting, dim=1)
            waiting, room = [], size
        waiting.append(values)
        room -= values.numel()
    if waiting:
        yield torch.cat(waiting, dim=1)


def carry(sums: Tensor) -> Tensor:
    """The same numbers [..., 4] with low limbs from 0 to 2^42 and high limbs from -2^41 to 2^41, the ends left out."""
    top, high, low, faults = sums.unbind(-1)
    high = high + (low >> LOW)
    carried = (high + (1 << LOW - 1)) >> LOW  # to the nearest: a small negative number has no top limb
    return torch.stack([top + carried, high - (carried << LOW), low & ((1 << LOW) - 1), faults], dim=-1)


def value_of(sums: Tensor) -> Tensor:
    """The fp64 number that limbs [..., 4] stand for; NaN where an addend did not fit."""
    top, high, low, faults = carry(sums).unbind(-1)
    value = top.double() * LARGEST + (high.double() * 2.0**-HIGH + low.double() * 2.0 ** -(HIGH + LOW))
    return torch.where(faults == 0, value, torch.nan)


class RoundedSums:
    """Losses and metrics add up as floating-point numbers: their sum depends on the layout in its last digits."""

    def share(self, values: Tensor) -> Tensor:
        """The sum of values [n], in a form that adds up with that of others."""
        return values.detach().sum()

    def ready(self, share: Tensor) -> Tensor:
        """A copy of a share, for a collective to add up."""
        return share.to(torch.float64, copy=True)

    def value(self, total: Tensor) -> Tensor:
        """The number in fp64."""
        return total


class FixedSums(RoundedSums):
    """Losses and metrics add up as limbs: their sum is the same in every layout."""

    def share(self, values: Tensor) -> Tensor:
        """See `RoundedSums`."""
        return limbs([values])

    def ready(self, share: Tensor) -> Tensor:
        """See `RoundedSums`."""
        return carry(share)

    def value(self, total: Tensor) -> Tensor:
        """See `RoundedSums`."""
        return value_of(total)
