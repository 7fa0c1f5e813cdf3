"""What the dry run says against a real step on gloo ranks, counted by the same ledger: memory, traffic, FLOPs."""

from __future__ import annotations

import pytest
import torch

from neox_native.config.check import require
from neox_native.config.schema import Config, Model, Parallel, Run, Training
from neox_native.engine.build import build_engine, build_model, build_step
from neox_native.fixed_point import PIECES
from neox_native.mesh import build_mesh
from neox_native.plan.dry_run import axes_of, dry_run, fake_batch, run_step
from neox_native.plan.ledger import Ledger
from tests.ranks import run_ranks

CPU = torch.device("cpu")
# Over tp the key-value head is shared, and the last rank has a row less of the vocabulary.
MODEL = Model(num_layers=4, hidden_size=128, num_heads=4, num_kv_heads=1, seq_length=128, vocab_size=511, vocab_multiple_of=1)
LAYOUTS = [
    (Parallel(dp=2, zero_stage=1), {}),
    (Parallel(dp=2, zero_stage=3), {"precision": "bf16"}),
    (Parallel(dp=4, zero_stage=2, zero_shard_size=2), {"precision": "bf16", "activation_checkpointing": "full"}),
    (Parallel(dp=1, tp=2, sequence_parallel=True), {"precision": "bf16", "activation_checkpointing": "selective"}),
    (Parallel(dp=1, pp=2), {"activation_checkpointing": "full"}),
    (Parallel(dp=1, pp=2, tp=2, pipeline_schedule="interleaved_1f1b", virtual_stages=2), {}),
]
CASES = [(*layout, "fast") for layout in LAYOUTS] + [(*layout, "elastic") for layout in LAYOUTS[:2]]


def real_step(config: Config) -> tuple[int, dict[str, int], int, int]:
    """On a gloo rank: the peak, bytes by axis, bytes to neighbours and FLOPs of a run's second step."""
    mesh = build_mesh(config.parallel, CPU)
    parts, optimizer = build_model(config, mesh, CPU)
    step = build_step(config, mesh, CPU, build_engine(config, mesh, CPU, parts, optimizer), optimizer)
    batch, ledger = fake_batch(config), Ledger(axes_of(mesh))
    step(batch, 1e-4)  # DTensor's first look at every operation is on fake tensors, which the ledger would count
    run_step(step, parts.values(), batch, ledger)
    sent = {axis: traffic.bytes for axis, traffic in ledger.totals.traffic.items()}
    return max(peak.num_bytes for peak in ledger.peaks().values()), sent, ledger.totals.sent_bytes, ledger.totals.flops


@pytest.mark.parametrize("parallel, training, determinism", CASES, ids=str)
def test_a_real_step_needs_what_the_dry_run_says(
    parallel: Parallel, training: dict, determinism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PIECES, "cpu", PIECES["cuda"])  # which the dry run takes
    ranks = parallel.pp * parallel.dp * parallel.tp
    settings = Training(global_batch_size=8 * parallel.dp, micro_batch_size=2, loss_slice_tokens=96, **training)
    config = Config(run=Run(determinism=determinism), model=MODEL, training=settings, parallel=parallel)
    config = require(config, ranks)
    rank = ranks - 1
    peak, sent, neighbours, flops = run_ranks(ranks, real_step, config)[rank]
    report = dry_run(config, rank, ranks, exact=True)
    # A fake group has no messages on their way; gloo's keep a few buffers alive.
    assert abs(report.peak_bytes / peak - 1) < 0.10, (report, peak)
    assert {axis: traffic["bytes"] for axis, traffic in report.communication.items() if traffic["bytes"]} == sent
    assert (report.point_to_point_bytes, report.hardware_flops) == (neighbours, flops)
