"""Checkpoints and meshes for the tests of generation and scoring."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from neox_native.data.tokenizers import byte_tokenizer
from neox_native.inference.generator import Generator, Limits, Row
from neox_native.inference.load import inference_mesh, load_model
from neox_native.inference.runner import Runner
from neox_native.inference.sampling import Sampling
from neox_native.inference.score import Score, Scorer, Window
from tests.interop.models import SMALL, checkpoint

CPU = torch.device("cpu")
MODELS = {
    "rotary": SMALL,
    "sequential": replace(SMALL, parallel_residual=False),
    "learned": replace(SMALL, pos_emb="learned"),
    "alibi": replace(SMALL, pos_emb="alibi", num_layers=4),
    "grouped swiglu": replace(SMALL, num_kv_heads=1, activation="swiglu", norm="rmsnorm", vocab_multiple_of=64),
    "tied": replace(SMALL, tie_embeddings=True, vocab_multiple_of=1),
}
PROMPTS = ["def f(x):", "a", "import os\nimport s", ""]


def checkpoints(folder: Path) -> dict[str, Path]:
    """A checkpoint of every model."""
    return {
        name: checkpoint(folder / name.replace(" ", "_"), model, tokenizer="byte") for name, model in MODELS.items()
    }


@contextmanager
def one_process():
    """A process group of one, as the tools start it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def runner(path: Path, pp: int = 1, tp: int = 1) -> Runner:
    """The checkpoint on this rank's mesh."""
    return Runner(load_model(path, inference_mesh(pp, tp, dist.get_world_size(), CPU), "fp32", CPU))


def answers(
    path: Path, sampling: Sampling, limits: Limits, pp: int = 1, tp: int = 1, use_cache: bool = True, prompts=PROMPTS
) -> list[Row]:
    """What one batch of prompts is answered with."""
    return Generator(runner(path, pp, tp), byte_tokenizer(), use_cache)(prompts, sampling, limits)


def scores(path: Path, windows: list[Window], pp: int = 1, tp: int = 1, batch_size: int = 3) -> list[Score]:
    """Scores of windows."""
    return Scorer(runner(path, pp, tp), batch_size)(windows)
