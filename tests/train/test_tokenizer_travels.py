"""A checkpoint holds the tokenizer that it was trained with, wherever it is copied."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train as entry
from neox_native.checkpoint import files
from neox_native.config.check import require
from neox_native.config.load import load
from neox_native.data.indexed import IndexedWriter
from neox_native.data.sidecar import Vocabulary, about
from neox_native.data.tokenizers import load_tokenizer
from tests.data.test_sidecar import tokenizer_file
from tests.ranks import RankError, run_ranks
from tools import convert, evaluate, generate

MODEL = [
    "--model.num_layers=1", "--model.hidden_size=16", "--model.num_heads=2", "--model.seq_length=16", "--model.vocab_size=257",
    "--training.global_batch_size=1", "--training.micro_batch_size=1", "--logging.tensorboard=false", "--run.device=cpu",
]  # fmt: skip


def test_a_checkpoint_alone_reads_and_writes_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tokenizer_file(tmp_path, "tok")
    tokenizer, run, alone = load_tokenizer(file), tmp_path / "run", tmp_path / "alone"
    with IndexedWriter(tmp_path / "text", np.uint16, about(Vocabulary.of(tokenizer), {})) as writer:
        writer.add_document(tokenizer.encode("some text " * 40))
    given = [*MODEL, f"--data.train={tmp_path / 'text'}", "--data.split=1", f"--run.dir={run}", "--checkpoint.keep_last=1"]

    def start(steps: int, *more: str) -> None:
        config = require(load(None, [*given, f"--training.steps={steps}", *more]), 1)
        run_ranks(1, lambda: entry.train(config, torch.device("cpu")))

    start(1, f"--data.tokenizer={file}", "--checkpoint.export=fp32")
    content = Path(file).read_bytes()
    Path(file).unlink()
    start(2, f"--data.tokenizer={file}")
    (checkpoint,) = (run / "checkpoints").iterdir()
    for folder in checkpoint, run / "weights":
        assert (folder / "tokenizer.json").read_bytes() == content and "tokenizer.json" in files.read_manifest(folder)
    metadata = files.read_metadata(checkpoint)
    assert (metadata["step"], metadata["tokenizer"], metadata["tokenizer_sha256"]) == (2, file, tokenizer.sha256)
    shutil.move(checkpoint, alone)
    shutil.rmtree(run)
    capfd.readouterr()
    generate.main(["--checkpoint", str(alone), "--prompt", "ab", "--max-new-tokens", "4", "--device", "cpu", "--json"])
    assert json.loads(capfd.readouterr().out)["text"] is not None
    evaluate.main(["--checkpoint", str(alone), "--data", str(tmp_path / "text"), "--device", "cpu", "--json"])
    assert json.loads(capfd.readouterr().out)["bytes"] == 399
    convert.main(["to-hf", str(alone), str(tmp_path / "hf")])
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == content
    convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "back")])
    shutil.rmtree(tmp_path / "hf")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == content
    (tmp_path / "text.about.json").unlink()
    shutil.copytree(alone, run / "checkpoints" / "step_000000002")
    start(3, f"--data.tokenizer={tmp_path / 'back'}")  # the same content
    said = "the checkpoint was trained with the tokenizer .*, data.tokenizer = 'byte' is another one"
    with pytest.raises(RankError, match=f"{said} .*; set it back"):
        start(4, "--data.tokenizer=byte")
    start(1, "--data.tokenizer=byte", f"--run.dir={tmp_path / 'tuned'}", f"--checkpoint.initialize_from={alone}")
    assert re.search(said, capfd.readouterr().out)
