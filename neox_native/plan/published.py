"""The time model against the published world: `published.toml`, row by row."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox_native.config.check import require
from neox_native.config.schema import Config, Model, Parallel, Training
from neox_native.model.flops import model_flops_per_token
from neox_native.plan.hardware import find_gpu
from neox_native.plan.speed import EAGER, FUSED, NEOX, OVERLAPPED, Machine, step_time

SOFTWARE = {"neox": NEOX, "eager": EAGER, "fused": FUSED, "overlapped": OVERLAPPED}


@dataclass(frozen=True)
class Comparison:
    """One published run."""

    name: str
    device: str
    gpus: int
    calibrates: bool
    """Whether a constant of the device was set so that this row fits."""
    published_mfu: float
    predicted_mfu: float
    source: str

    @property
    def error(self) -> float:
        """Predicted over published, minus one."""
        return self.predicted_mfu / self.published_mfu - 1.0


def compare_row(row: dict[str, Any]) -> Comparison:
    """Predict one row of `published.toml`."""
    known = find_gpu(row["device"])
    gpu = dataclasses.replace(known, **row.get("gpu", {}))
    machine = Machine(gpu, 8, SOFTWARE[row["software"]])
    seconds, recomputed = 0.0, row.get("recomputed", 0.0)
    # What is recomputed in part lies between nothing and everything.
    for checkpointing, weight in (("none", 1.0 - recomputed), ("full", recomputed)):
        model, training = Model(**row["model"]), Training(**row["training"], activation_checkpointing=checkpointing)
        training = dataclasses.replace(training, loss_slice_tokens=training.micro_batch_size * model.seq_length)  # theirs are whole
        config = require(Config(model=model, training=training, parallel=Parallel(**row["parallel"])), row["gpus"])
        seconds += weight * step_time(config, machine).seconds
    tokens = config.training.global_batch_size * config.model.seq_length / row["gpus"]
    predicted = tokens * model_flops_per_token(config.model) / seconds / gpu.peak_flops_per_second
    # MFU is published as a share of the data sheet's peak, whatever the machine's own.
    predicted *= gpu.peak_flops_per_second / known.peak_flops_per_second
    return Comparison(row["name"], row["device"], row["gpus"], row["calibrates"], row["mfu"], predicted, row["source"])


def comparisons() -> list[Comparison]:
    """All rows."""
    path = Path(__file__).with_name("published.toml")
    return [compare_row(row) for row in tomllib.loads(path.read_text(encoding="utf-8"))["rows"]]


def table(rows: list[Comparison]) -> str:
    """A Markdown table with the error of each row, and the mean error of those held out."""
    lines = ["| run | GPUs | published MFU | predicted | error | |", "|---|---|---|---|---|---|"]
    for row in rows:
        use = "calibrates" if row.calibrates else "held out"
        shares = f"{row.published_mfu:.1%} | {row.predicted_mfu:.1%} | {row.error:+.1%}"
        lines.append(f"| {row.name} | {row.gpus} {row.device} | {shares} | {use} |")
    held_out = [abs(row.error) for row in rows if not row.calibrates]
    return "\n".join(lines) + f"\n\nMean error of the {len(held_out)} rows held out: {sum(held_out) / len(held_out):.1%}."
