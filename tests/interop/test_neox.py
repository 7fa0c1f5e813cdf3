from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from neox_native.config.schema import Model
from neox_native.errors import UserError
from neox_native.interop.checkpoints import CheckpointReader
from neox_native.interop.gpt_neox import CUT_DIM, NeoxReader, place_of, within_layer
from neox_native.interop.gpt_neox_config import model_from_yaml
from tests.interop.models import SMALL, TOKENS, built, draw, weights
from tools import convert

MODEL = replace(SMALL, vocab_multiple_of=4, rotary_pct=0.5)
YAML = """
# the architecture, with GPT-NeoX's two spellings of names
{
  "num-layers": 3,
  "hidden_size": 32,   # channels
  "num-attention-heads": 4,
  "seq-length": 32,
  "max-position-embeddings": 32,
  "pos-emb": "rotary",
  "rotary_pct": 0.5,
  "no-weight-tying": true,
  "gpt-j-residual": %s,
  "make_vocab_size_divisible_by": 4,
  "optimizer": {"type": "Adam", "params": {"lr": 0.1}},
  "data-path": "some/where",
}
"""


def split(model: Model, tp: int, padding_rows: int) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """The model as GPT-NeoX lays it out: (pipeline entry, tensor-parallel rank) -> its names -> tensors."""
    entries: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for name, whole in weights(draw(model), model).items():
        entry, names = place_of(name, model.num_layers)
        local = within_layer(name)
        if name in ("embed_in.weight", "embed_out.weight"):
            whole = torch.cat((whole, torch.full((padding_rows, whole.shape[1]), 9.0)))
        for rank in range(tp):
            if local in CUT_DIM:
                shard = whole.chunk(tp, dim=CUT_DIM[local])[rank].clone()
            elif local.endswith(("dense.bias", "4h_to_h.bias")) and model.parallel_residual:
                shard = whole / tp  # each rank adds its own, so that the sum over ranks is what the model has
            else:
                shard = whole.clone()
            entries.setdefault((entry, rank), {})[names[0]] = shard
    return entries


def write_layers(folder: Path, model: Model, tp: int, padding_rows: int = 0) -> Path:
    """`layer_XX-model_YY-model_states.pt` files."""
    folder.mkdir(parents=True)
    for (entry, rank), tensors in split(model, tp, padding_rows).items():
        extra = {"attention.rotary_emb.inv_freq": torch.ones(4)} if 2 <= entry < model.num_layers + 2 else {}
        torch.save(tensors | extra, folder / f"layer_{entry:02}-model_{rank:02}-model_states.pt")
        torch.save({"module": None}, folder / f"mp_rank_{rank:02}_model_states.pt")
    return folder


def write_ranks(folder: Path, model: Model, tp: int, padding_rows: int = 0) -> Path:
    """`mp_rank_YY_model_states.pt` files with what training leaves beside the weights."""
    folder.mkdir(parents=True)
    entries = split(model, tp, padding_rows)
    for rank in range(tp):
        module = {
            f"sequential.{entry}.{name}": tensor
            for (entry, of_rank), tensors in entries.items() if of_rank == rank for name, tensor in tensors.items()
        }  # fmt: skip
        state = {
            "module": module, "iteration": 7, "args": {"num_layers": 3, "tokenizer_type": "HFTokenizer"},
            "np_rng_state": np.random.get_state(), "random_rng_state": random.getstate(), "optimizer": None,
        }  # fmt: skip
        torch.save(state, folder / f"mp_rank_{rank:02}_model_states.pt")
    return folder


@pytest.mark.parametrize("parallel_residual", [True, False], ids=["parallel residual", "sequential residual"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("write", [write_layers, write_ranks])
def test_any_degree_and_layout_converts_to_the_same_model(tmp_path, write, tp, parallel_residual):
    model = replace(MODEL, parallel_residual=parallel_residual)
    reader = NeoxReader(write(tmp_path / "neox", model, tp, padding_rows=120), model)
    assert reader.tp == tp
    expected = weights(draw(model), model)
    for name, tensor in weights(reader, model).items():
        assert torch.equal(tensor, expected[name]), name  # powers of two divide and sum exactly
    assert torch.equal(built(model, reader)(TOKENS), built(model, draw(model))(TOKENS))


def test_a_tied_model_needs_no_head(tmp_path):
    model = replace(MODEL, tie_embeddings=True, pos_emb="learned")
    reader = NeoxReader(write_layers(tmp_path / "neox", model, 2), model)
    assert "embed_out.weight" not in reader.shapes and torch.equal(
        reader("embed_pos.weight"), draw(model)("embed_pos.weight")
    )


def test_newer_names_of_the_feed_forward_layer_are_read(tmp_path):
    folder = write_layers(tmp_path / "neox", MODEL, 2)
    for file in folder.glob("layer_0[234]-*"):
        tensors = torch.load(file, weights_only=True)
        renamed = {
            n.replace("dense_h_to_4h", "linear1").replace("dense_4h_to_h", "linear2"): t for n, t in tensors.items()
        }
        torch.save(renamed, file)
    name = "layers.1.mlp.dense_4h_to_h.bias"
    assert torch.equal(NeoxReader(folder, MODEL)(name), draw(MODEL)(name))


def test_settings_come_from_our_config(tmp_path):
    folder = write_layers(tmp_path / "neox" / "global_step7", MODEL, 2, padding_rows=60)
    (folder.parent / "latest").write_text("global_step7\n")
    settings = "\n".join(f"{name} = {getattr(MODEL, name)}" for name in (
        "num_layers", "hidden_size", "num_heads", "seq_length", "vocab_size", "vocab_multiple_of",
        "rotary_pct"))  # fmt: skip
    (tmp_path / "model.toml").write_text(f"[model]\n{settings}\n")
    arguments = ["--config", str(tmp_path / "model.toml"), "--tokenizer", "byte"]
    convert.main(["from-neox", str(folder.parent), str(tmp_path / "ours"), *arguments])
    reader = CheckpointReader(tmp_path / "ours")
    assert reader.model == MODEL and reader.metadata["tokenizer"] == "byte"
    assert torch.equal(reader("embed_out.weight"), draw(MODEL)("embed_out.weight"))


@pytest.mark.parametrize(
    "vocabulary", [["--vocab-size", "257"], ["--tokenizer", "byte"], []], ids=["given", "tokenizer", "kept"]
)
def test_settings_come_from_the_yaml_beside_the_checkpoint(tmp_path, vocabulary):
    folder = write_layers(tmp_path / "neox" / "global_step7", MODEL, 2, padding_rows=60)
    (folder / "configs").mkdir()
    (folder / "configs" / "small.yml").write_text(YAML % "true")
    convert.main(["from-neox", str(folder), str(tmp_path / "ours"), *vocabulary])
    reader = CheckpointReader(tmp_path / "ours")
    kept = replace(MODEL, vocab_size=320, vocab_multiple_of=1)
    assert reader.model == (MODEL if vocabulary else kept)
    assert torch.equal(reader("embed_in.weight")[:260], draw(MODEL)("embed_in.weight"))


def test_yaml_that_we_cannot_express_is_refused(tmp_path):
    file = tmp_path / "model.yml"
    for line, sentence in [
        ('"activation": "mish"', "activation = 'mish'"),
        ('"gpt_j_tied": true', "gpt_j_tied = True"),
        ('"pos_emb": "rpe"', "pos_emb = 'rpe'"),
        ('"num_layers": null', "does not say num_layers"),
    ]:
        file.write_text(YAML % "false" + line + "\n")
        with pytest.raises(UserError, match=sentence):
            model_from_yaml([file], 257)
    file.write_text(YAML % "false" + '"bias_gelu_fusion": true\n')
    assert model_from_yaml([file], 257).activation == "gelu_tanh"


def refused(folder: Path, model: Model, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        NeoxReader(folder, model)


def test_wrong_folders_are_refused_with_a_sentence(tmp_path):
    folder = write_layers(tmp_path / "neox", MODEL, 2)
    refused(tmp_path / "nothing", MODEL, "is no folder")
    refused(tmp_path, MODEL, "is no checkpoint of GPT-NeoX")
    refused(folder, replace(MODEL, num_layers=5), "has no layer_0.-model_00.*model.num_layers = 5")
    refused(folder, replace(MODEL, hidden_size=64), r"embed_in.weight has shape \(260, 32\) over 2 ranks")
    refused(folder, replace(MODEL, vocab_size=300), "at most that many rows, with --vocab-size or in --config with model.vocab_size")
    refused(folder, replace(MODEL, norm="layernorm", activation="swiglu"), "orders the weights of gated layers")
    with pytest.raises(UserError, match="does not say what model it holds"):
        convert.main(["from-neox", str(folder), str(tmp_path / "ours")])
    (folder / "layer_03-model_01-model_states.pt").unlink()
    refused(folder, MODEL, "misses layer_03-model_01_model_states.pt")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("ran",))

    folder = write_ranks(tmp_path / "neox", MODEL, 1)
    file = folder / "mp_rank_00_model_states.pt"
    torch.save({"module": {}, "trap": Trap()}, file)
    refused(folder, MODEL, r"is refused: it holds objects other than tensors \(\S*print\)")
    file.write_bytes(file.read_bytes()[:50])
    refused(folder, MODEL, "is damaged or no file of torch.save")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda tensors: [tensors], "holds no dict of tensors"),
        (lambda tensors: tensors | dict.fromkeys(tensors, 7), "is no tensor of weights"),
        (lambda tensors: tensors | {name: tensor.int() for name, tensor in tensors.items()}, "is no tensor of weights"),
        (lambda tensors: tensors | dict.fromkeys(tensors, torch.tensor(1.0)), r"has shape \(\)"),
        (lambda tensors: {name: tensor[:, None] for name, tensor in tensors.items()}, "has shape"),
        (lambda tensors: {(0, ((1,),)): tensors}, "neither a word nor a number"),
    ],
)
@pytest.mark.parametrize("entry", [0, 5], ids=["embedding", "last norm"])
def test_a_file_of_other_types_is_refused_in_a_sentence(tmp_path, entry, change, sentence):
    folder = write_layers(tmp_path / "neox", replace(MODEL, num_layers=2), 2)
    file = folder / f"layer_{entry:02}-model_01-model_states.pt"
    torch.save(change(torch.load(file)), file)
    refused(folder, replace(MODEL, num_layers=2), sentence)


@pytest.mark.parametrize("module", [None, 7, [1, 2], "sequential.0.word_embeddings.weight"])
def test_a_rank_whose_module_is_no_dict_is_refused(tmp_path, module):
    torch.save({"module": module}, tmp_path / "mp_rank_00_model_states.pt")
    refused(tmp_path, MODEL, "does not hold the model that was described")


@pytest.mark.parametrize("named", [b"../elsewhere", b"/etc", b"\xff\xfe", b""])
def test_latest_that_names_no_folder_beside_it_is_refused(tmp_path, named):
    (tmp_path / "latest").write_bytes(named)
    with pytest.raises(UserError, match="latest is refused"):
        NeoxReader(tmp_path, MODEL)


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("num_layers: 10000000", "must be 10,000 or less"),
        ("hidden_size: wide", "model.hidden_size = 'wide' must be a whole number"),
        ("rotary_pct: [0.5", "does not say"),
        ("x:" + " " * 100_000 + "y", "does not say"),
    ],
)
def test_yaml_that_describes_no_model_is_refused(tmp_path, line, sentence):
    file = tmp_path / "a.yml"
    file.write_text("\n".join([line] if sentence == "does not say" else [YAML % "true", line]))
    with pytest.raises(UserError, match=sentence):
        model_from_yaml([file], 100)
