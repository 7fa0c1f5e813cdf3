"""Messages between pipeline ranks, played back as strictly as NCCL may take them.

With one communicator for a group, a rank's messages are a queue: each waits until the one before it has met its other half,
and those of a batch go together. So every rank's messages are recorded, on a group of ranks that do not exist, and the queues
are played against each other.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from neox_native.config.layout_rules import ZERO_BUBBLE
from neox_native.config.schema import Model
from neox_native.parallel.pipeline import Pipeline, Stage
from neox_native.parallel.stages import stages_of_rank
from neox_native.parallel.timeline import timeline
from tests.parallel.layouts import CPU, NoSink

MODEL = Model(hidden_size=4, seq_length=3, vocab_size=8)
SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("looped_bfs", 2), ("interleaved_zero_bubble", 2), ("zbv", 2)]


class Message(NamedTuple):
    """One half of a message."""

    is_send: bool
    peer: int
    what: Any
    """Which message it is; both halves must say the same."""


Queue = list[tuple[Message, ...]]
"""A rank's messages in the order in which it issues them; those of a batch together."""


class Recorder(TorchDispatchMode):
    """Notes the messages of a rank. What it receives is full of ones, which is also what torch's stages agree by before the
    first step."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: Queue = []
        self.batch: list[Message] | None = None
        self.names: dict[int, Any] = {}
        self.buffers: list[weakref.ref] = []
        self.most_buffers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._overloadpacket.__name__
        if function.namespace == "c10d" and name in ("send", "recv_"):
            (tensor,), _, peer, *_ = args
            message = Message(name == "send", peer, self.names.get(tensor.data_ptr(), tuple(tensor.shape)))
            if self.batch is None:
                self.queue.append((message,))
            else:
                self.batch.append(message)
            if name == "recv_":
                tensor.detach().fill_(1)
                if tensor.is_floating_point():
                    self.buffers = [*filter(lambda buffer: buffer(), self.buffers), weakref.ref(tensor.untyped_storage())]
                    self.most_buffers = max(self.most_buffers, len(self.buffers))
        return result

    def together(self, function: Callable[..., Any], *args: Any) -> Any:
        """A batch: `torch.distributed.batch_isend_irecv`."""
        self.batch = []
        result = function(*args)
        self.queue.append(tuple(self.batch))
        self.batch = None
        return result

    def named(self, function: Callable[..., Any], direction: str, from_here: int, stage: Stage, microbatch: int) -> Any:
        """Operations of a stage, named after who sends."""
        operations = function(stage, microbatch)
        for operation in operations:
            self.names[operation.tensor.data_ptr()] = direction, stage.stage_index + from_here, microbatch
        return operations

    @contextmanager
    def recording(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patched, self:
            patched.setattr(dist, "batch_isend_irecv", partial(self.together, dist.batch_isend_irecv))
            for name, direction, from_here in (
                ("get_fwd_send_ops", "forward", 0), ("get_fwd_recv_ops", "forward", -1),
                ("get_bwd_send_ops", "backward", 0), ("get_bwd_recv_ops", "backward", 1),
            ):  # fmt: skip
                noting = partial(self.named, getattr(Stage, name), direction, from_here)
                patched.setattr(Stage, name, lambda stage, microbatch, noting=noting: noting(stage, microbatch))
            yield


class Part(nn.Module):
    """As little of a model as a stage can be."""

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.config, self.readout, self.first = MODEL, nn.Identity() if last else None, first
        self.layer = nn.Linear(MODEL.hidden_size, MODEL.hidden_size)

    def forward(self, x: Tensor, targets_BT: Tensor | None = None, dropout_seed: int = 0) -> Tensor:
        x = x[..., None].expand(-1, -1, MODEL.hidden_size).float() if self.first else x
        x = x + self.layer(x)
        return x if self.readout is None else x.sum(-1)


def recorded(schedule: str, virtual: int, pp: int, microbatches: int, rank: int, evaluate: bool = False) -> Recorder:
    """What a rank's first two steps, or an evaluation, issue."""
    recorder, num_stages = Recorder(), pp * virtual
    fields = {name: torch.zeros(microbatches, 1, MODEL.seq_length, dtype=torch.int64) for name in ("tokens_BT", "targets_BT")}
    dist.init_process_group("fake", rank=rank, world_size=pp, store=FakeStore())
    try:
        parts = {number: Part(number == 0, number == num_stages - 1) for number in stages_of_rank(rank, pp, virtual, schedule)}
        shape, group = (1, MODEL.seq_length), dist.group.WORLD
        pipeline = Pipeline(parts, num_stages, schedule, microbatches, shape, MODEL.seq_length, torch.float32, CPU, group, NoSink())
        with recorder.recording():
            if evaluate:
                pipeline.forward(fields, lambda values, _: values.sum())
            else:
                for _ in range(2):
                    pipeline.forward_backward(fields, lambda values, _: values.sum(), range(microbatches))
    finally:
        dist.destroy_process_group()
    return recorder


def stuck(queues: Sequence[Queue]) -> Mapping[int, list[Message]]:
    """Play the queues; the messages at which ranks wait for ever, by rank."""
    left = [deque(queue) for queue in queues]
    heads: list[list[Message]] = [[] for _ in queues]
    moved = True
    while moved:
        moved = False
        for rank, head in enumerate(heads):
            if not head and left[rank]:
                head.extend(left[rank].popleft())
                moved = True
            for message in list(head):
                others = [each for each in heads[message.peer] if each.peer == rank and each.is_send != message.is_send]
                if others:
                    assert others[0].what == message.what, (rank, message, others[0])
                    head.remove(message)
                    heads[message.peer].remove(others[0])
                    moved = True
    return {rank: head for rank, head in enumerate(heads) if head}


@pytest.mark.parametrize("pp, microbatches", [(2, 4), (3, 7), (4, 8)])
@pytest.mark.parametrize("schedule, virtual", SCHEDULES)
def test_no_schedule_can_deadlock_and_each_holds_what_is_in_flight(schedule: str, virtual: int, pp: int, microbatches: int) -> None:
    if microbatches % pp and schedule.startswith("interleaved"):
        microbatches = 6  # which fills their rounds
    ranks = [recorded(schedule, virtual, pp, microbatches, rank) for rank in range(pp)]
    assert all(rank.queue for rank in ranks)
    assert stuck([rank.queue for rank in ranks]) == {}
    drawn = timeline(schedule, pp, virtual, microbatches)
    for number, rank in enumerate(ranks):
        assert 0 < rank.most_buffers <= most(schedule, drawn.peak_in_flight(number))


def most(schedule: str, in_flight: int) -> int:
    """Receive buffers of a rank: an input of each microbatch in flight and one more message; in the interleaved schedule up to
    three, which neighbours send early. Weight halves that come late read the gradients that were received, too."""
    if schedule in ZERO_BUBBLE:
        return 2 * in_flight
    return in_flight + (3 if schedule == "interleaved_1f1b" else 1)


@pytest.mark.parametrize("schedule, virtual", SCHEDULES)
def test_no_evaluation_can_deadlock(schedule: str, virtual: int) -> None:
    assert stuck([recorded(schedule, virtual, 3, 4, rank, evaluate=True).queue for rank in range(3)]) == {}


def test_two_ranks_that_both_send_first_wait_for_ever_unless_batched() -> None:
    sends, receives = [Message(True, 1, "a"), Message(True, 0, "b")], [Message(False, 1, "b"), Message(False, 0, "a")]
    assert stuck([[(send,), (receive,)] for send, receive in zip(sends, receives)]) == {0: [sends[0]], 1: [sends[1]]}
    assert stuck([[(send, receive)] for send, receive in zip(sends, receives)]) == {}
    with pytest.raises(AssertionError):
        stuck([[(Message(True, 1, "a"),)], [(Message(False, 0, "b"),)]])
