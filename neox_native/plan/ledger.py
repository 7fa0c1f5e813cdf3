"""What one rank allocates, communicates and computes, noted operation by operation.

[Note: tape] Every storage that appears or goes is an entry on a tape, between marks that say where in the step it happened.
The tape is played afterwards to find the peak, because a buffer may show what it is for only after it was allocated: when a
collective fills it. The ledger works on real and on fake tensors, with DTensors, pipelines and any number of microbatches; it
costs some microseconds per operation.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, COMMUNICATION = KINDS = (
    "parameters",
    "gradients",
    "optimizer_state",
    "activations",
    "communication",
)
"""Kinds of memory. Optimizer state: fp32 masters and moments. Activations: all that forward and backward passes create,
intermediate results included. Communication: gathered rows of ZeRO and what a pipeline stage receives."""


_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _attention: lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    _attention_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape),
}
"""Operations of an operator [FLOP]: torch's counts, and attention on a CPU, which it leaves out."""


@dataclass(slots=True)
class Storage:
    """One piece of memory."""

    num_bytes: int
    kind: str


@dataclass
class Traffic:
    """What this rank's collectives on one axis move."""

    bytes: int = 0
    """Sent by this rank, if every collective is a ring: (n - 1) / n of the whole tensor for a gather or a scatter,
    twice that for an all-reduce (Patarasuk and Yuan 2009)."""
    collectives: int = 0


@dataclass(frozen=True)
class Mark:
    """A place in a step."""

    what: str
    """The work that begins, such as "forward"."""
    microbatch: int | None = None
    """The number of its microbatch, if it has one."""

    def __str__(self) -> str:
        return self.what if self.microbatch is None else f"{self.what} of microbatch {self.microbatch}"


@dataclass(frozen=True)
class Peak:
    """The moment at which most memory was in use."""

    by_kind: dict[str, int]
    at: Mark
    """The last mark before it."""

    @property
    def num_bytes(self) -> int:
        """All kinds together."""
        return sum(self.by_kind.values())


@dataclass
class Totals:
    """Sums over the time that the ledger was active."""

    traffic: dict[str, Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    """By name of the axis."""
    sent_bytes: int = 0
    """Point to point."""
    flops: int = 0


class Ledger(TorchDispatchMode):
    """Notes memory, collectives and FLOPs while it is active. See [Note: tape].

    Args:
        axes: name of a process group -> axis to book it under; any other group joins the ends of the pipeline: "pp".
    """

    def __init__(self, axes: Mapping[str, str]):
        super().__init__()
        self.axes, self.totals = axes, Totals()
        self.known: dict[int, tuple[weakref.ref, Storage]] = {}
        self.tape: list[tuple[Storage, int]] = []
        self.marks: list[tuple[int, Mark]] = [(0, Mark("before the first microbatch"))]
        self.watched: list[tuple[torch.UntypedStorage, Storage]] = []

    def claim(self, tensors: Iterable[Tensor], kind: str, resizable: bool = False) -> None:
        """Book tensors that exist already under a kind.

        Args:
            resizable: their storage grows and shrinks; no operation shows that, so every one looks again.
        """
        for tensor in tensors:
            storage = self._note(tensor)
            storage.kind = kind
            if resizable:
                self.watched.append((_local(tensor).untyped_storage(), storage))

    def mark(self, mark: Mark) -> None:
        """Name what happens from here on."""
        self.marks.append((len(self.tape), mark))

    def peaks(self) -> dict[Hashable, Peak]:
        """The peak of each kind of work. A microbatch does a work of one name in each of a rank's stages: the first, second ...
        time are kinds of their own."""
        peaks: dict[Hashable, Peak] = {}
        times: Counter[Mark] = Counter()
        live, total = dict.fromkeys(KINDS, 0), 0
        ends = [start for start, _ in self.marks[1:]] + [len(self.tape)]
        for (start, mark), end in zip(self.marks, ends):
            work = mark.what, times[mark]
            times[mark] += 1
            largest = peaks[work].num_bytes if work in peaks else -1
            for storage, change in self.tape[start:end]:
                live[storage.kind] += change
                total += change
                if total > largest:
                    largest, peaks[work] = total, Peak(dict(live), mark)
        return peaks

    def __torch_dispatch__(self, function: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note it."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local operations come by
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet = function._overloadpacket
        if packet in FLOPS:
            self.totals.flops += FLOPS[packet](*args, **kwargs, out_val=result)
        for output in tree_iter(result):
            if isinstance(output, Tensor) and output.device.type != "meta":
                self._note(output)
        if function.namespace in ("c10d", "_c10d_functional"):
            self._communication(function, args, result)
        for untyped, storage in self.watched:
            self._resized(storage, untyped.nbytes())
        return result

    def _note(self, tensor: Tensor) -> Storage:
        untyped = _local(tensor).untyped_storage()
        key = untyped._cdata
        if key not in self.known:
            storage = Storage(untyped.nbytes(), ACTIVATIONS)
            self.known[key] = weakref.ref(untyped, lambda _: self._freed(key)), storage
            self.tape.append((storage, storage.num_bytes))
        return self.known[key][1]

    def _freed(self, key: int) -> None:
        _, storage = self.known.pop(key)
        self.tape.append((storage, -storage.num_bytes))

    def _resized(self, storage: Storage, num_bytes: int) -> None:
        if num_bytes != storage.num_bytes:
            self.tape.append((storage, num_bytes - storage.num_bytes))
            storage.num_bytes = num_bytes

    def _communication(self, function: Any, args: Any, result: Any) -> None:
        name = function._overloadpacket.__name__
        group = _group_of(function, args)
        if group is None or group.size() == 1:
            return
        tensors = [tensor for tensor in tree_iter((args, result)) if isinstance(tensor, Tensor)]
        whole = max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
        axis = self.axes.get(group.group_name, "pp")
        if name in ("send", "recv_"):
            self._explain(tensors if name == "recv_" else (), COMMUNICATION)
            sent = whole if name == "send" else 0
            if axis == "pp":
                self.totals.sent_bytes += sent
            else:  # a collective made of pairs, as on gloo
                self.totals.traffic[axis].bytes += sent
            return
        passes = 2 if "reduce" in name and "scatter" not in name else 1
        traffic = self.totals.traffic[axis]
        traffic.bytes += passes * whole * (group.size() - 1) // group.size()
        traffic.collectives += 1
        if function.namespace == "c10d" and axis.startswith("dp"):  # ZeRO's, on buffers of its own
            self._explain(tensors, GRADIENTS if "reduce" in name else COMMUNICATION)

    def _explain(self, tensors: Iterable[Tensor], kind: str) -> None:
        for tensor in tensors:
            storage = self._note(tensor)
            if storage.kind == ACTIVATIONS:
                storage.kind = kind


def _local(tensor: Tensor) -> Tensor:
    """The tensor that holds the memory of a DTensor or of a collective's pending result."""
    tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return getattr(tensor, "elem", tensor)


def _group_of(function: Any, args: Sequence[Any]) -> dist.ProcessGroup | None:
    """The process group of a collective; None for what is none, such as waiting."""
    for argument, value in zip(function._schema.arguments, args):
        if argument.name == "group_name":
            return _resolve_process_group(value)
        if argument.name == "process_group":
            return dist.ProcessGroup.unbox(value)
    return None
