from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from neox_native.errors import UserError
from neox_native.interop.checkpoints import CheckpointReader
from neox_native.interop.hugging_face import HuggingFaceReader, plan_shards, write_folder
from neox_native.launch import Ranks
from tests.checkpoint.test_safe import rewrite
from tests.interop.models import SMALL, TOKENS, assert_equal, built, checkpoint, draw, weights
from tools import convert

VARIANTS = {
    "parallel residual": SMALL,
    "sequential residual": replace(SMALL, parallel_residual=False),
    "all channels turned": replace(SMALL, rotary_pct=1.0, rotary_base=5000.0),
    "tied": replace(SMALL, tie_embeddings=True),
    "tied, sequential, all turned": replace(SMALL, tie_embeddings=True, parallel_residual=False, rotary_pct=1.0),
    "tanh gelu, no attention biases": replace(SMALL, activation="gelu_tanh", attention_bias=False, ffn_hidden_size=48),
}


def exported(folder: Path, model=SMALL, **options) -> Path:
    read = draw(model)
    write_folder(folder, model, {n: t.shape for n, t in weights(read, model).items()}, read, Ranks(), **options)
    return folder


@pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_round_trip_is_bitwise(tmp_path, model):
    source = checkpoint(tmp_path / "ours", model, tokenizer="byte")
    convert.main(["to-hf", str(source), str(tmp_path / "hf"), "--shard-gb", "2e-5"])
    convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "back")])
    reader = CheckpointReader(tmp_path / "back")
    assert reader.model == model and reader.metadata["tokenizer"] == "byte"
    assert_equal(weights(CheckpointReader(source), model), weights(reader, model))
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 3


@pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS.keys())
def test_transformers_computes_the_same_logits(tmp_path, model):
    import transformers

    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(
        exported(tmp_path / "hf", model), dtype=torch.float32
    ).eval()
    ours = built(model, draw(model)).eval()
    with torch.no_grad():
        expected, found = theirs(TOKENS).logits, ours(TOKENS)
    assert found.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_folder_that_transformers_wrote_is_read_bitwise(tmp_path, model):
    import transformers

    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(exported(tmp_path / "hf", model), dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    reader = HuggingFaceReader(tmp_path / "again")
    assert reader.model == model
    assert_equal(weights(draw(model), model), weights(reader, model))


def test_the_byte_tokenizer_travels_along(tmp_path):
    import transformers

    folder = exported(tmp_path / "hf", tokenizer="byte")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n\treturn 'ü€'  # \x00\r\n"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token_id == 256


def test_half_precision_rounds_once(tmp_path):
    reader = HuggingFaceReader(exported(tmp_path / "hf", dtype=torch.bfloat16))
    assert_equal({n: t.bfloat16() for n, t in weights(draw(SMALL), SMALL).items()}, weights(reader, SMALL))


def test_shards_hold_at_most_their_size_and_every_parameter_once():
    held = [{"a": 4, "b": 4, "c": 4}, {"a": 4, "b": 4, "c": 4}, {"d": 9, "a": 4}]
    assert plan_shards(held, 8) == [(0, ["a", "b"]), (0, ["c"]), (2, ["d"])]


REFUSED = {
    "pos_emb": "alibi", "norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "mlp_bias": False,
}  # fmt: skip


def test_settings_that_the_target_cannot_express_are_refused_by_name(tmp_path):
    for name, value in REFUSED.items():
        with pytest.raises(UserError, match=rf"cannot express model\.{name} = {value!r}"):
            exported(tmp_path / "hf", replace(SMALL, **{name: value}))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        exported(tmp_path / "hf")


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model_type": "llama"}, "model of type 'llama'; only 'gpt_neox'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary positions of type 'linear'"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ({"num_hidden_layers": 4}, r"misses layers\.3\..* not a whole"),
        ({"num_hidden_layers": 2}, r"has layers\.2\.attention.*no place for"),
        ({"intermediate_size": 64}, r"has shape .* config.json says"),
        ({"vocab_size": 999}, "contradicts itself"),
        ({"num_hidden_layers": 10**7}, r"model\.num_layers = 10000000 must be 10,000 or less"),
        ({"hidden_size": 10**12}, r"model\.hidden_size = 1000000000000 must be 1,048,576 or less"),
        ({"num_attention_heads": 10**15}, r"model\.num_heads = .* must be"),
        ({"num_attention_heads": 5}, r"model\.num_heads = 5 does not divide"),
        ({"num_hidden_layers": "3"}, r"model\.num_layers = '3' must be a whole number"),
        ({"hidden_size": [32]}, r"model\.hidden_size = \[32\] must be a whole number"),
        ({"rope_parameters": [1]}, "rope_parameters is no table"),
        ({"neox_native": 3}, "neox_native is no table"),
        ({"hidden_act": ["gelu"]}, r"hidden_act = \['gelu'\]"),
        ({"intermediate_size": None}, "has no intermediate_size"),
    ],
)
def test_folders_of_other_models_are_refused(tmp_path, changes, sentence):
    folder = exported(tmp_path / "hf")
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=sentence):
        HuggingFaceReader(folder)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "..", 3, None, "a\n"])
def test_an_index_that_names_no_file_of_the_folder_is_refused(tmp_path, shard):
    folder = exported(tmp_path / "hf")
    for weight_map, sentence in ({"gpt_neox.embed_in.weight": shard}, "no file of this folder"), ([shard], "is no table"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=sentence):
            HuggingFaceReader(folder)


def test_a_checkpoint_that_does_not_hold_the_model_that_it_describes_is_refused(tmp_path):
    source = checkpoint(tmp_path / "ours")
    about = json.loads((source / "metadata.json").read_text())
    rewrite(source / "metadata.json", json.dumps(about | {"model": about["model"] | {"hidden_size": 1 << 19}}).encode())
    with pytest.raises(UserError, match=r"does not fit this model: different shapes"):
        CheckpointReader(source)


def test_missing_and_damaged_files_are_named(tmp_path):
    folder = exported(tmp_path / "hf", shard_bytes=20000)
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{shards[1].name} is damaged"):
        HuggingFaceReader(folder)
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"misses the shards {shards[1].name}"):
        HuggingFaceReader(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="has no .safetensors files"):
        HuggingFaceReader(folder)
    with pytest.raises(UserError, match="is no Hugging Face folder"):
        HuggingFaceReader(tmp_path)


def test_a_tokenizer_with_more_ids_than_the_vocabulary_is_refused(tmp_path):
    model = replace(SMALL, vocab_size=200)
    with pytest.raises(UserError, match=r"'byte' has 257 ids.*model.vocab_size = 200"):
        exported(tmp_path / "hf", model, tokenizer="byte")
    exported(tmp_path / "hf", model)
    with pytest.raises(UserError, match="--tokenizer = 'byte' has 257 ids"):
        convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "back"), "--tokenizer", "byte"])


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"\.\[hf\]"):
        exported(tmp_path / "hf")


def test_a_damaged_checkpoint_and_a_folder_without_one_are_refused(tmp_path):
    source = checkpoint(tmp_path / "ours")
    (source / "__0_0.distcp").write_bytes(b"nothing")
    with pytest.raises(UserError, match="__0_0.distcp has 7 bytes"):
        convert.main(["to-hf", str(source), str(tmp_path / "hf")])
    with pytest.raises(UserError, match="holds no checkpoint"):
        convert.main(["to-hf", str(tmp_path), str(tmp_path / "hf")])


def test_a_single_file_with_the_newer_name_of_the_head_and_old_buffers_is_read(tmp_path):
    from safetensors.torch import save_file

    folder = exported(tmp_path / "hf")
    (folder / "model.safetensors.index.json").unlink()
    theirs = {f"gpt_neox.{name}": tensor for name, tensor in weights(draw(SMALL), SMALL).items()}
    theirs["lm_head.weight"] = theirs.pop("gpt_neox.embed_out.weight")
    theirs["gpt_neox.layers.0.attention.masked_bias"] = torch.zeros(())
    save_file(theirs, folder / "model.safetensors")
    assert_equal(weights(draw(SMALL), SMALL), weights(HuggingFaceReader(folder), SMALL))
