"""Pipeline parallelism on torch's schedules: stages, one training step, and a forward-only pass for evaluation.

Shapes: M microbatches of a step, B sequences of a microbatch, T sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from neox_native.model.transformer import Transformer
from neox_native.parallel.stages import rank_of_stage
from neox_native.parallel.timing import Timing

SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "looped_bfs": "LoopedBFS",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
}
"""Our name of a schedule -> torch's."""

Fields = Mapping[str, Tensor]
"""Arguments of the model's forward by name, each [M, B, ...]; `tokens_BT` is its first."""
LossFunction = Callable[[Tensor, int], Tensor]
"""Makes a scalar to differentiate from the values per token [B, T] of a microbatch and its number."""


class GradientSink(Protocol):
    """Who collects gradients while the schedule runs (the ZeRO optimizer)."""

    def microbatch(self, stage_index: int, last: bool) -> None:
        """A backward pass of this stage begins; `last` if no other microbatch of the step follows."""

    def absorb(self) -> None:
        """A weight-gradient pass ended; its gradients lie in `.grad`, no hook saw them."""


class Stage(PipelineStage):
    """torch's stage, which also tells the gradient sink where in the step it is, and times its compute.

    [Note: receive buffers] torch's stage keeps a receive buffer for every microbatch of a step. Here one is made as its receive
    is posted and let go as the microbatch's backward pass ends, so that a stage has those of the microbatches in flight and of
    messages on their way; what the weight half of a split backward pass still reads lives until then. The allocator hands
    the same memory round. That is safe on a GPU: NCCL's stream waits for the compute stream as a receive is posted, and the
    compute stream waits for the message before it reads the buffer.
    """

    sink: GradientSink
    timing: Timing
    microbatch: int
    """The last one that went forward."""
    dropout_seeds: Sequence[int]
    """Of the step's microbatches."""
    graphs: dict[int, Any]
    """Of microbatches between the halves of their backward pass, on the last stage: torch 2.11 keeps handles of nodes, and
    those of custom nodes keep nothing alive."""

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        """Tensors that torch makes here for later have shapes alone."""
        device, self.device = self.device, torch.device("meta")
        yield
        self.device = device

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        """Notes what each microbatch will receive. See [Note: receive buffers]."""
        with self._without_memory():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        """The same for gradients."""
        with self._without_memory():
            return super()._prepare_backward_infra(*args, **kwargs)

    def _get_recv_ops(self, recv_infos: tuple[Any, ...]) -> list[dist.P2POp]:
        """Receives to post, each into a new buffer."""
        _move_buffers(recv_infos, self.device)
        return super()._get_recv_ops(recv_infos)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """First messages to the neighbours, that open connections; torch 2.11 would connect a V's tip to itself."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Forward of one microbatch."""
        self.microbatch = fwd_chunk_id
        self.timing.on_microbatch(fwd_chunk_id)
        with self.timing.compute.running():
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """The call of the stage's module: the seed joins here, behind torch's bookkeeping of tensors."""
        return super().forward_maybe_with_nosync(*args, dropout_seed=self.dropout_seeds[self.microbatch], **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, loss=None, full_backward: bool = True, last_backward: bool = False):
        """Backward of one microbatch, or its input half."""
        self.timing.on_microbatch(bwd_chunk_id)
        self.sink.microbatch(self.stage_index, last_backward and full_backward)
        if loss is not None and not full_backward:
            self.graphs[bwd_chunk_id] = loss.grad_fn
        with self.timing.compute.running():
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if loss is not None:
            loss.detach_()  # torch keeps it until the step is over, and its graph would keep what was received
        received = (*self.args_recv_info[bwd_chunk_id], *self.grad_recv_info.get(bwd_chunk_id, ()))
        _move_buffers(received, torch.device("meta"))

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """The weight half of a split backward."""
        self.sink.microbatch(self.stage_index, False)
        with self.timing.compute.running():
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.graphs.pop(bwd_chunk_id, None)
        self.sink.absorb()


def _move_buffers(received: Iterable[Any], device: torch.device) -> None:
    """New buffers on `device` in place of those of messages, and of what stages of one rank hand over, without their
    content. With them goes the input's gradient, which torch leaves there where backward passes are split."""
    for info in received:
        if (buffer := getattr(info, "buffer", None)) is not None:  # what the pipeline itself is fed has none
            buffer.grad = None
            info.buffer = torch.empty_like(buffer, device=device, requires_grad=buffer.requires_grad)


class Pipeline:
    """Runs a step's microbatches through this rank's stages.

    Args:
        parts: this rank's stages: global stage number -> part of the model.
        num_stages: stages of the whole pipeline.
        schedule: a name from `SCHEDULES`.
        num_microbatches: M.
        microbatch_shape: (B, T).
        hidden_length: T, or this rank's share of it under sequence parallelism.
        dtype: of the hidden states that travel between stages.
        pp_group: the pipeline's ranks.
    """

    def __init__(
        self,
        parts: dict[int, Transformer],
        num_stages: int,
        schedule: str,
        num_microbatches: int,
        microbatch_shape: tuple[int, int],
        hidden_length: int,
        dtype: torch.dtype,
        device: torch.device,
        pp_group: dist.ProcessGroup,
        sink: GradientSink,
    ):
        self.parts, self.num_stages, self.schedule_name, self.group, self.device = parts, num_stages, schedule, pp_group, device
        self.num_microbatches = num_microbatches
        self.timing = Timing(device)
        model = next(iter(parts.values())).config
        hidden = torch.empty(microbatch_shape[0], hidden_length, model.hidden_size, dtype=dtype, device="meta")
        self.hidden_meta = hidden.requires_grad_()
        tokens = torch.empty(microbatch_shape, dtype=torch.int64, device="meta")
        values = torch.empty(microbatch_shape, dtype=torch.float32, device="meta", requires_grad=True)
        self.stages = []
        for number, part in parts.items():
            # Static shapes: without them torch runs a whole forward and backward pass to learn them.
            output = self.hidden_meta if part.readout is None else values
            inputs = tokens if number == 0 else self.hidden_meta
            stage = Stage(part, number, num_stages, device, input_args=inputs, output_args=output, group=pp_group)
            stage.sink, stage.timing, stage.graphs = sink, self.timing, {}
            self.stages.append(stage)
        schedule_class = get_schedule_class(SCHEDULES[schedule])
        stages = self.stages if issubclass(schedule_class, PipelineScheduleMulti) else self.stages[0]
        self.schedule = schedule_class(stages, num_microbatches, loss_fn=self._loss, scale_grads=False)
        self.loss_function: LossFunction | None = None

    def _loss(self, values_BT: Tensor, _target: Tensor) -> Tensor:
        (last,) = (stage for stage in self.stages if stage.is_last)
        return self.loss_function(values_BT, last.microbatch)

    def forward_backward(self, fields: Fields, loss_function: LossFunction, dropout_seeds: Sequence[int]) -> Tensor:
        """One step's microbatches forward and backward; gradients go to the sink.

        Returns:
            the loss of each microbatch [M], detached; none [0] on ranks without the last stage.
        """
        self.loss_function = loss_function
        for stage in self.stages:
            stage.dropout_seeds = dropout_seeds
        first, last = 0 in self.parts, self.num_stages - 1 in self.parts
        losses: list[Tensor] = []
        unread = {"tokens_BT"} if last else {"tokens_BT", "targets_BT"}
        with self.timing.whole.running():
            self.schedule.step(
                *((fields["tokens_BT"].flatten(0, 1).contiguous(),) if first else ()),
                target=torch.empty(self.num_microbatches) if last else None,  # torch wants one; the loss looks its own up
                losses=losses if last else None,
                return_outputs=False,
                **{name: tensor.flatten(0, 1) for name, tensor in fields.items() if name not in unread},
            )
        return torch.stack([loss.detach() for loss in losses]) if last else torch.empty(0, device=self.device)

    @torch.no_grad()
    def forward(self, fields: Fields, loss_function: LossFunction) -> Tensor:
        """Forward only, for evaluation; the same for every schedule. Returns what `forward_backward` returns.

        Each microbatch walks through all stages in order, so that the ranks' sends and receives cannot wait for each
        other in a circle. With one stage per rank the microbatches still follow one another like a pipeline.
        """
        losses = []
        for index in range(len(fields["tokens_BT"])):
            self.timing.on_microbatch(index)
            arguments = {name: tensor[index] for name, tensor in fields.items()}
            tokens, hidden = arguments.pop("tokens_BT"), None
            for stage in range(self.num_stages):
                if stage in self.parts:
                    hidden = self.parts[stage](tokens if stage == 0 else self._receive(stage, hidden), **arguments)
                    self._send(stage, hidden)
            if self.num_stages - 1 in self.parts:
                losses.append(loss_function(hidden, index))
        return torch.stack(losses) if losses else torch.empty(0, device=self.device)

    def _peer(self, stage: int) -> int | None:
        """The pipeline rank of a neighbouring stage; None where that stage is this rank's own or does not exist."""
        if stage == self.num_stages or stage in self.parts:
            return None
        return rank_of_stage(stage, dist.get_world_size(self.group), self.schedule_name)

    def _receive(self, stage: int, own: Tensor | None) -> Tensor:
        peer = self._peer(stage - 1)
        if peer is None:
            return own
        buffer = torch.empty_like(self.hidden_meta, device=self.device, requires_grad=False)
        dist.recv(buffer, group=self.group, group_src=peer)
        return buffer

    def _send(self, stage: int, hidden: Tensor) -> None:
        peer = self._peer(stage + 1)
        if peer is not None:
            dist.send(hidden.contiguous(), group=self.group, group_dst=peer)
