"""Conversions hold a few tensors at a time, however many there are."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from neox_native.interop.checkpoints import CheckpointReader, write_checkpoint
from neox_native.interop.hugging_face import write_folder
from neox_native.launch import Ranks
from tests.interop.models import SMALL, checkpoint, draw

MODEL = replace(SMALL, num_layers=6)
TENSORS_OF_A_LAYER = 12


class Counting:
    """Passes tensors on and remembers the most that were alive at once."""

    def __init__(self, read):
        self.read, self.alive, self.most = read, weakref.WeakSet(), 0

    def __call__(self, name: str) -> torch.Tensor:
        tensor = self.read(name)
        self.alive.add(tensor)
        self.most = max(self.most, len(self.alive))
        return tensor


def test_our_checkpoint_is_written_from_one_tensor_at_a_time(tmp_path):
    read = Counting(draw(MODEL))
    write_checkpoint(tmp_path / "ours", MODEL, read, {})
    assert read.most <= 3  # the one written, the one before, and the one read


def test_a_hugging_face_folder_is_written_from_one_shard_at_a_time(tmp_path):
    reader = CheckpointReader(checkpoint(tmp_path / "ours", MODEL))
    read = Counting(reader)
    write_folder(tmp_path / "hf", MODEL, reader.shapes, read, Ranks(), shard_bytes=10_000)
    assert read.most <= 2 * TENSORS_OF_A_LAYER + 2
