"""Token files say which tokenizer made them, and what reads them checks it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from neox_native import __version__
from neox_native.checkpoint.tokenizer_files import byte_level_json
from neox_native.data.indexed import IndexedDataset
from neox_native.data.sidecar import read_sidecar
from neox_native.data.tokenizers import load_tokenizer
from neox_native.errors import UserError
from tests.data.corpora import random_documents, write_files
from tests.data.loading import datasets
from tests.data.test_prepare import pytestmark
from tools import prepare_data

__all__ = ["pytestmark"]


def tokenizer_file(folder: Path, name: str, extra: str = "", **spelling: int) -> str:
    """A tokenizer.json of bytes, with one token more if `extra` names it."""
    content = byte_level_json()
    content["pre_tokenizer"]["use_regex"] = True
    if extra:
        content["added_tokens"].append({"id": 257, "content": extra, "special": True})
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, **spelling))  # type: ignore[arg-type]
    return str(path)


def prepared(folder: Path, name: str, tokenizer: str) -> str:
    """A prefix of token files that the tool makes."""
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * 9}) + "\n" for n in range(60)))
    out = str(folder / name)
    prepare_data.main(["--input", str(folder / "a.jsonl"), "--append-eod", "--tokenizer", tokenizer, "--output", out])
    return out


def test_preparation_says_what_made_the_files_whatever_its_spelling(tmp_path: Path) -> None:
    file, spelt = tokenizer_file(tmp_path, "tok"), tokenizer_file(tmp_path, "other", indent=2)
    prefix = prepared(tmp_path, "out", file)
    told = json.loads(Path(f"{prefix}.about.json").read_text())
    tokenizer = load_tokenizer(file)
    assert told["tokenizer"] == {
        "name": tokenizer.name, "sha256": tokenizer.sha256, "vocab_size": 257, "end_of_document": 256
    }  # fmt: skip
    files = IndexedDataset(prefix)
    assert (told["documents"], told["tokens"]) == (60, int(files.sizes.sum()))
    assert told["made_by"]["version"] == __version__ and told["made_by"]["options"]["append_eod"] is True
    assert read_sidecar(files) == told
    assert load_tokenizer(spelt).sha256 == tokenizer.sha256 and load_tokenizer(spelt).name != tokenizer.name
    assert load_tokenizer(tokenizer_file(tmp_path, "more", "<x>")).sha256 != tokenizer.sha256 != load_tokenizer("byte").sha256


def test_data_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    file = tokenizer_file(tmp_path, "tok")
    prefix, foreign = prepared(tmp_path, "out", file), write_files(tmp_path / "foreign", random_documents(1, 60))
    assert datasets(prefix, tokenizer=file).train.num_samples
    datasets([{"path": prefix, "weight": 1.0}, {"path": foreign, "weight": 1.0}], tokenizer=file)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"{prefix} was made with the tokenizer .*tok-.*, but data.tokenizer = 'byte' is byte \("):
        datasets(prefix)
    with pytest.raises(UserError, match=rf"{prefix} was made .*, but data.tokenizer = 'byte'"):
        datasets(foreign, eval_every=2, valid=prefix)
    with pytest.raises(UserError, match="data.tokenizer = 'nofile.json' is neither"):
        datasets(foreign, tokenizer="nofile.json")
    datasets(foreign, tokenizer="")
    Path(f"{prefix}.about.json").unlink()
    datasets(prefix)


def test_two_tokenizers_are_neither_mixed_nor_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tokenizer_file(tmp_path, "tok")
    first, second = prepared(tmp_path, "first", file), prepared(tmp_path, "second", "byte")
    said = rf"{first} was made with the tokenizer .*tok-.* and {second} with byte .*; a model reads one"
    with pytest.raises(UserError, match=said):
        datasets([{"path": first, "weight": 1.0}, {"path": second, "weight": 1.0}], tokenizer="")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=said):
        prepare_data.main(["--merge", first, second, "--output", str(tmp_path / "both")])
    assert not list(tmp_path.glob("both*"))
    prepare_data.main(["--merge", first, first, "--output", str(tmp_path / "twice")])
    told = read_sidecar(IndexedDataset(tmp_path / "twice"))
    assert told and told["documents"] == 120 and len(told["made_by"]["options"]["merged"]) == 2
    assert told["tokenizer"]["sha256"] == load_tokenizer(file).sha256
    foreign = write_files(tmp_path / "foreign", random_documents(1, 9))
    prepare_data.main(["--merge", first, foreign, "--output", str(tmp_path / "some")])
    assert read_sidecar(IndexedDataset(tmp_path / "some")) is None
    assert "of 2 files; not each of them tells its tokenizer" in capsys.readouterr().out


def test_a_vocabulary_that_does_not_fit_is_refused_or_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tokenizer_file(tmp_path, "tok")
    prefix, foreign = prepared(tmp_path, "out", file), write_files(tmp_path / "foreign", random_documents(1, 60, vocab_size=100))
    for data, tokenizer in (prefix, file), (prefix, ""), (foreign, file):
        with pytest.raises(UserError, match=r"model.vocab_size = 256 is below the 257 ids of .*; raise it to 257"):
            datasets(data, tokenizer=tokenizer, vocab_size=256)
    capsys.readouterr()
    datasets(foreign, vocab_size=100)
    assert "model.vocab_size = 100 is below the 257 ids of data.tokenizer = 'byte': did it make" in capsys.readouterr().out
    datasets(prefix, tokenizer=file, vocab_size=50277)
    assert "model.vocab_size = 50,277 is 50,020 more than the 257 ids of data.tokenizer" in capsys.readouterr().out
    datasets(prefix, tokenizer=file, vocab_size=384)
    assert "model.vocab_size" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, said",
    [
        ({"documents": 3}, "of 3 documents .* the files were replaced; remove out.about.json"),
        ({"format": 2}, "does not say in format 1 what made"),
        ({"tokenizer": {"name": "x"}}, "does not say in format 1 what made"),
    ],
)
def test_a_sidecar_of_other_files_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    prefix = prepared(tmp_path, "out", "byte")
    sidecar = Path(f"{prefix}.about.json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | change))
    with pytest.raises(UserError, match=said):
        datasets(prefix)


def test_inputs_without_a_document_write_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    (tmp_path / "b.txt").write_text("")
    out = tmp_path / "out"
    for given, said in (["a.jsonl"], "a.jsonl has no line"), (["a.jsonl", "b.txt"], "b.txt: 1 dropped, empty"):
        with pytest.raises(UserError, match=f"--input holds no document: .*{said}"):
            prepare_data.main(["--input", *(str(tmp_path / name) for name in given), "--output", str(out)])
        assert not list(tmp_path.glob("out*"))
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "a"}\n\n \r\n{"text": "b"}\n\n'.encode())
    prepare_data.main(["--input", str(tmp_path / "a.jsonl"), "--max-bad", "0", "--output", str(out)])
    assert [bytes(IndexedDataset(out).get(n).astype("u1")) for n in range(2)] == [b"a", b"b"]


@pytest.mark.parametrize("place", ["a.txt/out", "/proc/out", "/proc/deep/out", "", ".", "{folder}"])
def test_an_output_that_cannot_be_written_is_a_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    place = place.format(folder=tmp_path).replace("a.txt", str(tmp_path / "a.txt"))
    for source in ["--input", str(tmp_path / "a.txt")], ["--merge", write_files(tmp_path / "text", [[1]])]:
        with pytest.raises(UserError, match="could not be written: |is a folder; give the common prefix"):
            prepare_data.main([*source, "--output", place])


def test_a_tokenizer_that_is_a_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="list.json' cannot be loaded exactly: its content is '.1.', not a JSON object"):
        arguments = ["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out")]
        prepare_data.main([*arguments, "--tokenizer", str(tmp_path / "list.json")])
