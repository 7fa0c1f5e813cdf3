"""Seeds of a step's dropout masks. See [Note: masks] in `model/masks.py`."""

from __future__ import annotations

from neox_native.config.schema import Run
from neox_native.data.loader import StepBatch
from neox_native.data.order import rows_of_rank
from neox_native.mesh import Mesh
from neox_native.model.initialize import seed_of


class DropoutSeeds:
    """A seed for each microbatch of a step.

    Samples are numbered through the whole run, so that a microbatch's first sample tells its step, too. Ranks of one
    tensor-parallel group hold the same residual stream and must drop the same elements; with sequence parallelism they hold
    different tokens and must not.

    Args:
        seed: the run's.
    """

    def __init__(self, mesh: Mesh, seed: int = Run.seed, sequence_parallel: bool = False) -> None:
        self.rows, self.seed, self.slice = mesh.rows, seed, mesh.tensor.rank if sequence_parallel else 0

    def __call__(self, batch: StepBatch) -> list[int]:
        """The seeds of this rank's share of a step."""
        num_microbatches, micro_batch_size = batch.model_fields["tokens_BT"].shape[:2]
        num_rows = num_microbatches * micro_batch_size * self.rows.size
        rows = rows_of_rank(num_rows, micro_batch_size, self.rows.rank, self.rows.size)[:, 0]
        first = batch.consumed_samples - num_rows
        return [seed_of(self.seed, f"dropout.{first + row}.{self.slice}") for row in rows]
