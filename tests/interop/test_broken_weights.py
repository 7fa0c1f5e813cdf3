"""Weights that are not finite, and tokenizers that are gone: what each tool makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from neox_native.data.indexed import IndexedWriter
from neox_native.errors import UserError
from neox_native.interop import checkpoints
from neox_native.interop.hugging_face import HuggingFaceReader
from tests.interop.models import SMALL, checkpoint, draw
from tools import convert, evaluate

BROKEN = "layers.1.mlp.dense_h_to_4h.weight"


def broken(path: Path, value: float) -> Path:
    """A checkpoint of which one number is `value`, and a later one, too."""
    read = draw(SMALL)

    def read_broken(name: str) -> Tensor:
        tensor = read(name).clone()
        if name in (BROKEN, "final_layer_norm.weight"):
            tensor.view(-1)[3] = value
        return tensor

    checkpoints.write_checkpoint(path, SMALL, read_broken, {})
    return path


def write_data(folder: Path) -> str:
    with IndexedWriter(str(folder / "data"), np.uint16) as writer:
        writer.add_document(np.arange(40) % 100)
    return str(folder / "data")


def test_weights_that_are_not_finite_are_converted_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, sentence = str(broken(tmp_path / "nan", float("nan"))), f"{BROKEN} of .*nan holds numbers that are not finite"
    with pytest.raises(UserError, match=sentence + ".*before they broke.*--allow-nonfinite"):
        convert.main(["to-hf", source, str(tmp_path / "hf")])
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]
    convert.main(["to-hf", source, str(tmp_path / "hf"), "--allow-nonfinite"])
    told = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert len(told) == 1 and BROKEN in told[0]
    with pytest.raises(UserError, match=BROKEN + " of .*hf holds numbers that are not finite"):
        convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "back")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "nan"]
    convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "back"), "--allow-nonfinite"])
    assert torch.equal(checkpoints.CheckpointReader(tmp_path / "back")(BROKEN).isnan(), HuggingFaceReader(tmp_path / "hf")(BROKEN).isnan())


def test_numbers_beyond_the_range_of_the_type_are_named_too(tmp_path: Path) -> None:
    source = str(broken(tmp_path / "large", 1e6))
    with pytest.raises(UserError, match=f"{BROKEN} of .* not finite in torch.float16; take another --dtype"):
        convert.main(["to-hf", source, str(tmp_path / "hf"), "--dtype", "fp16"])
    convert.main(["to-hf", source, str(tmp_path / "hf"), "--dtype", "bf16"])


def test_a_model_of_broken_weights_is_not_run(tmp_path: Path) -> None:
    source = str(broken(tmp_path / "inf", float("inf")))
    with pytest.raises(UserError, match=f"inf cannot be run: {BROKEN} holds numbers that are not finite in fp32"):
        evaluate.main(["--checkpoint", source, "--data", write_data(tmp_path), "--device", "cpu"])


def test_token_files_and_weights_need_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path)
    results = []
    for name, about in ("nameless", {}), ("lost", {"tokenizer": str(tmp_path / "gone.json")}):
        source = str(checkpoint(tmp_path / name, **about))
        evaluate.main(["--checkpoint", source, "--data", data, "--json", "--device", "cpu"])
        shown = capsys.readouterr()
        results.append(json.loads(shown.out))
        assert ("Bytes and words are not counted: data.tokenizer = " in shown.err) == bool(about)
        convert.main(["to-hf", source, str(tmp_path / f"{name}_hf")])
        shown = capsys.readouterr().out
        assert "The tokenizer is not known: the folder gets none." in shown and ("gone.json" in shown) == bool(about)
        assert not list((tmp_path / f"{name}_hf").glob("tokenizer*"))
    assert results[0] == results[1] and "bytes" not in results[0]
    for arguments in (["--text", data + ".idx"], ["--data", data, "--tokenizer", str(tmp_path / "gone.json")]):
        with pytest.raises(UserError, match="gone.json"):
            evaluate.main(["--checkpoint", source, "--device", "cpu", *arguments])
    with pytest.raises(UserError, match="gone.json"):
        convert.main(["to-hf", source, str(tmp_path / "named"), "--tokenizer", str(tmp_path / "gone.json")])
