"""The first step and the first weight in which two runs differ are named, whatever their layouts."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from neox_native import commands
from neox_native.checkpoint import files, store
from neox_native.checkpoint.safe import read_index
from neox_native.compare.runs import compare
from neox_native.config.schema import Model
from neox_native.errors import UserError
from neox_native.launch import Ranks
from neox_native.model.transformer import cards
from tests.checkpoint.small_runs import run, settings, write_corpus

OLD = Path(__file__).parents[1] / "checkpoint" / "goldens" / "step_000000003"
MODEL = Model(num_layers=11, hidden_size=8, num_heads=2, seq_length=8, vocab_size=10, vocab_multiple_of=2, rotary_pct=0.5)
Change = dict[str, tuple[int, float]]
"""Name of a tensor -> (flat index, what is added there)."""


def state(change: Change = {}) -> dict[str, torch.Tensor]:
    shapes = {name: card.shape for name, card in cards(MODEL).items()}
    found = {f"model.{name}": torch.ones(shape) for name, shape in shapes.items()}
    found |= {f"optimizer.exp_avg.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    found |= {"optimizer.step": torch.tensor(2.0), "loss_scale.growth": torch.tensor(3)}
    for name, (place, more) in change.items():
        found[name].view(-1)[place] += more
    return found


def write_run(folder: Path, losses: list[float | None], events: list[dict] = [], saves: dict[int, Change] = {}, **fields: object) -> Path:
    """A run's folder with these losses, events, and checkpoints of these steps with what is changed in them."""
    folder.mkdir()
    said = [{"step": step, "loss": loss, "step_seconds": float(step), "batch_hash": "0a", **fields} for step, loss in enumerate(losses, 1)]
    for name, lines in ("metrics.jsonl", said), ("events.jsonl", events):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, change in saves.items():
        store.save(folder / "checkpoints", step, state(change), {"step": step, "model": asdict(MODEL)}, Ranks())
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    events = [{"kind": "evaluation", "step": 2, "loss": 2.5, "time": "yesterday"}, {"kind": "signal", "step": 3}]
    return write_run(tmp_path_factory.mktemp("base") / "a", [4.0, 3.0, 2.0], events, {1: {}, 3: {}}, mfu=0.5)


def exit_status(monkeypatch: pytest.MonkeyPatch, *words: object) -> object:
    """Of `neox-compare WORDS`."""
    monkeypatch.setattr(sys, "argv", ["neox-compare", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        commands.compare()
    return left.value.code


def test_runs_whose_times_alone_differ_are_bitwise_equal(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [{"kind": "evaluation", "step": 2, "loss": 2.5, "time": "today"}]
    other = write_run(tmp_path / "b", [4.0, 3.0, 2.0, 1.0], events, {1: {}, 3: {}}, step_seconds=9.0, aside=1.0)
    assert exit_status(monkeypatch, base, other) == 0
    steps, saves = "3 logged steps compared, of 3 and 4: bitwise equal", "2 checkpoints compared, of 2 and 2: bitwise equal"
    assert capsys.readouterr().out == f"{steps}\n{saves}\n"


def test_the_first_step_that_differs_is_named_with_both_values(base: Path, tmp_path: Path) -> None:
    events = [{"kind": "evaluation", "step": 2, "loss": 2.5000001}, {"kind": "bad step", "step": 2, "sample_ids": [8, 9]}]
    events += [{"kind": "bad step", "step": 4, "sample_ids": [16]}]  # the other run has not come so far
    found = compare(base, write_run(tmp_path / "b", [4.0, 3.0000003, None, 1.0], events))
    lines = [str(difference) for difference in found.logged]
    assert lines == [
        "step 2: loss 3.0 | 3.0000003, 1e-07 relative; at 2 steps (1e-07 at most)",
        "step 2: evaluation loss 2.5 | 2.5000001, 4e-08 relative",
        "step 2: bad step sample_ids None | [8, 9]",
    ]
    assert found.num_logged == 3 and found.logged[0].num_steps == 2 and not found.equal


def test_the_first_weight_that_differs_is_named_in_the_order_of_the_model(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, later = "model.layers.2.mlp.dense_4h_to_h.weight", "model.layers.10.input_layernorm.weight"
    changes = {"optimizer.exp_avg.embed_in.weight": (0, 1.0), later: (0, 1.0), first: (5, -0.5)}
    other = write_run(tmp_path / "b", [4.0, 3.0, 2.0], saves={1: {}, 3: changes})
    assert exit_status(monkeypatch, base, other, "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert found["logged"] == [] and found["checkpoints"] == [1, 3] and not found["equal"]
    told = found["checkpoint"]
    assert (told["step"], told["name"], told["elements"], told["largest"]) == (3, first, 1, 0.5)
    assert (told["num_differing"], told["num_tensors"]) == (3, len(state()))
    assert "step 3: model.layers.2" in "\n".join(compare(base, other).lines())
    moments = write_run(tmp_path / "c", [4.0], saves={3: {name: changes[name] for name in list(changes)[:1]}})
    assert compare(base, moments).saved.name == "optimizer.exp_avg.embed_in.weight"


def test_checkpoints_are_compared_by_name_too_and_those_of_other_types_differ(base: Path, tmp_path: Path) -> None:
    saved = base / "checkpoints" / "step_000000003"
    assert compare(base, saved).equal and compare(saved, base / "checkpoints" / "step_000000001").equal
    metadata, weights = {"step": 3, "model": asdict(MODEL)}, {name: value for name, value in state().items() if name.startswith("model.")}
    alone = store.write(tmp_path / "weights", "Exporting", weights, metadata, Ranks())
    assert str(compare(saved, alone).saved).startswith(f"optimizer.exp_avg.embed_in.weight is in {saved} alone; ")
    low = store.write(tmp_path / "low", "Exporting", {name: value.bfloat16() for name, value in state().items()}, metadata, Ranks())
    assert str(compare(saved, low).saved).startswith("model.embed_in.weight is float32 [10, 8] | bfloat16 [10, 8]; ")


def test_a_checkpoint_of_an_earlier_version_is_read_for_its_hashes(tmp_path: Path) -> None:
    index, metadata = read_index(OLD), files.read_metadata(OLD)
    tensors = {name: store.read_alone(OLD, name, index) for name in index.state_dict_metadata}
    assert files.read_hashes(OLD) is None
    assert compare(OLD, store.save(tmp_path, 3, tensors, metadata, Ranks())).equal
    tensors["model.final_layer_norm.bias"][2] += 1
    found = compare(OLD, store.save(tmp_path, 4, tensors, metadata, Ranks())).saved
    assert found.name == "model.final_layer_norm.bias" and (found.elements, found.largest) == (1, pytest.approx(1.0))


def test_what_cannot_be_compared_is_a_sentence(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(monkeypatch, base, tmp_path / "nowhere") == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nowhere'} is neither the folder of a run")
    elsewhere = write_run(tmp_path / "b", [], saves={9: {}})
    with pytest.raises(UserError, match="no step in common: .*logged steps 1 to 3 and checkpoints of steps 1, 3, .* steps 9"):
        compare(base, elsewhere)
    damaged = Path(shutil.copytree(base / "checkpoints" / "step_000000001", tmp_path / "step_000000001"))
    told = json.loads((damaged / files.HASHES).read_text())
    told["tensors"]["model.embed_in.weight"] = "0" * 16  # a hash that is not of its tensor
    records = files.read_manifest(damaged) | {files.HASHES: files.write_hashes(damaged, told["tensors"])}
    files.write_json(damaged / files.MANIFEST, {"files": records})
    with pytest.raises(UserError, match="model.embed_in.weight is not what hashes.json tells"):
        compare(base, damaged)
    (damaged / files.HASHES).write_text("{}")
    with pytest.raises(UserError, match="hashes.json has 2 bytes, its manifest says"):
        compare(base, damaged)
    (elsewhere / "metrics.jsonl").write_text('{"step": 1, "loss": 4.0}\n{"step": []}\n7\n{"step": 2, "lo')
    (elsewhere / "config.toml").write_text("nonsense = 1")
    shutil.copy(Path(__file__).parents[2] / "configs" / "quickstart.toml", base / "config.toml")
    found = compare(base, elsewhere)
    assert found.equal and found.num_logged == 1 and next(found.lines()).startswith("settings cannot be compared: ")


def test_layouts_have_the_same_hashes_until_their_numbers_differ(tmp_path: Path) -> None:
    """An odd vocabulary, and a key-value head that both tensor-parallel ranks hold: parts that overlap and no even cuts."""
    corpus = write_corpus(tmp_path)
    common = ["--model.vocab_size=61", "--model.vocab_multiple_of=1", "--model.num_kv_heads=1", "--training.steps=2", "--run.determinism=fast"]
    common += ["--checkpoint.save_every=0", "--checkpoint.save_steps=[0]"]
    layouts = {"one": ["--parallel.dp=1"], "many": ["--parallel.pp=2", "--parallel.dp=2", "--parallel.tp=2", "--parallel.zero_stage=1"]}
    for name, layout in layouts.items():
        run(settings(corpus, tmp_path / name, *common, *layout, "--checkpoint.async=true"))
    found = compare(tmp_path / "one", tmp_path / "many")
    assert {"parallel.pp", "parallel.dp", "parallel.tp"} <= found.settings.keys()
    assert found.saved_steps == (0, 2) and found.saved is not None and found.saved.name.startswith("model.")
    assert found.saved.largest is not None and 0 < found.saved.largest < 1e-4
    hashes = {name: events_of(tmp_path / name) for name in layouts}
    assert hashes["one"][0] == hashes["many"][0] and hashes["one"][1] != hashes["many"][1]
    assert ("checkpoint state_hash", 2) in [(difference.name, difference.step) for difference in found.logged]


def events_of(folder: Path) -> list[str]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line["state_hash"] for line in lines if line["kind"] == "checkpoint"]
