"""How a run is laid out over ranks, and compiled. See `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from neox_native.config.ranges import Count, CountOrRest, Range


@dataclass(frozen=True)
class Parallel:
    """How the ranks are laid out: pp * dp * tp = number of ranks. What cuts along an axis is ignored where it has one rank:
    schedule and stages at pp 1, zero_stage and zero_shard_size at dp 1, sequence_parallel and async_tp at tp 1."""

    pp: Count = 1
    """Pipeline-parallel degree [ranks]."""
    dp: CountOrRest = -1
    """Data-parallel degree [ranks]; -1 takes the ranks that pp and tp leave."""
    tp: Count = 1
    """Tensor-parallel degree [ranks]."""
    sequence_parallel: bool = False
    """Shard norms, residual stream and dropout along the sequence over the tp axis."""
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv"] = "1f1b"
    """Order of forward and backward passes in the pipeline."""
    virtual_stages: Count = 1
    """Stages per pipeline rank; looped schedules take 2 or more."""
    stage_layers: list[Count] = field(default_factory=list)
    """Layers of each stage, first to last; empty lets the code balance them, embedding and head weighed in."""
    zero_stage: Annotated[int, Range("between 0 and 3", lambda number: 0 <= number <= 3)] = 0
    """ZeRO stage: 0 keeps everything, 1 shards optimizer state, 2 also gradients, 3 also parameters, over dp."""
    zero_shard_size: Annotated[int, Range("0 or at least 2", lambda number: number == 0 or number >= 2)] = 0
    """Neighbours on the dp axis among which ZeRO shards; gradients are summed across such groups, too (HSDP) [ranks]. 0 takes
    the whole axis; zero_stage 0 shards nothing."""
    async_tp: bool = False
    """Send over tp in pieces, beside the matrix products that read or made them, in compiled blocks of GPUs that read each
    other's memory (torch's asynchronous tensor parallelism); takes sequence_parallel."""

    @property
    def shard_ranks(self) -> int:
        """Data-parallel ranks among which ZeRO shards. The section must be resolved."""
        return (self.zero_shard_size or self.dp) if self.zero_stage else 1


@dataclass(frozen=True)
class Compile:
    """torch.compile."""

    enabled: bool | Literal["auto"] = "auto"
    """Compile each block and the loss; "auto" does on a GPU, where nothing that the settings ask for forbids it. The run's
    config.toml says what was chosen."""

    @property
    def on(self) -> bool:
        """Whether to compile. "auto" is false until `check.on_device` has chosen."""
        return self.enabled is True
