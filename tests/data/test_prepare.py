"""Preparation: the same files for any number of workers, resumed after a kill, never half there."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from neox_native.data.indexed import IndexedDataset
from neox_native.data.preparation import documents, prepare as module
from neox_native.data.preparation.part import PieceReport, Recipe, Report
from neox_native.data.preparation.prepare import join, prepare
from neox_native.errors import UserError
from tests.data.corpora import file_bytes, random_documents, write_files
from tests.data.loading import datasets, steps_of
from tests.data.test_documents import write_packed
from tools import prepare_data

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
END = 256


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "SMALLEST_PART_BYTES", 300)


def texts(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choice('ab\nä "') for _ in range(draw.randrange(1, 60))) for _ in range(count)]


def jsonl(values: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: value}) + "\n" for value in values).encode()


def files_of(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()


def quietly(
    inputs: list[Path], prefix: Path, recipe: Recipe = Recipe(), workers: int = 1, share: float = 0.0
) -> Report:
    return prepare([str(i) for i in inputs], prefix, recipe, workers=workers, max_bad_share=share, log=lambda _: None)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("eod", [False, True])
def test_the_files_are_the_documents_in_order_for_any_number_of_workers(
    tmp_path: Path, workers: int, eod: bool
) -> None:
    first, second, third = texts(1, 40), texts(2, 9), texts(3, 5)
    write_packed(tmp_path / "a.jsonl", jsonl(first))
    write_packed(tmp_path / "b.jsonl.gz", jsonl(second))
    (tmp_path / "src").mkdir()
    for number, text in enumerate(third):
        (tmp_path / "src" / f"{number}.py").write_text(text)
    report = quietly(
        [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "src"],
        tmp_path / "out",
        Recipe(append_eod=eod),
        workers,
    )
    expected = [list(text.encode()) + [END] * eod for text in first + second + third]
    assert files_of(tmp_path / "out") == file_bytes(expected)
    assert report.documents == 54 and report.tokens == sum(map(len, expected)) and not report.dropped()
    assert report.text_bytes == sum(len(text.encode()) for text in first + second + third)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl.gz", "out.about.json", "out.bin", "out.idx", "src"]


def test_documents_cannot_end_themselves_unless_allowed(tmp_path: Path) -> None:
    write_packed(tmp_path / "a.jsonl", jsonl(["x<|endoftext|>"]))
    quietly([tmp_path / "a.jsonl"], tmp_path / "safe")
    quietly([tmp_path / "a.jsonl"], tmp_path / "open", Recipe(allow_special=True))
    assert END not in IndexedDataset(tmp_path / "safe").get(0)
    assert IndexedDataset(tmp_path / "open").get(0).tolist() == [ord("x"), END]


def test_prompts_are_masked_and_responses_are_labels(tmp_path: Path) -> None:
    rows = [{"q": "why", "a": "so"}, {"q": "", "a": "ä"}, {"q": "no answer", "a": ""}]
    write_packed(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    recipe = Recipe(prompt="{q}? ", response_key="a", append_eod=True)
    report = quietly([tmp_path / "a.jsonl"], tmp_path / "out", recipe)
    tokens = [[*b"why? so", END], [*"? ä".encode(), END]]
    labels = [[-100] * 5 + [*b"so", END], [-100] * 2 + [*"ä".encode(), END]]
    assert files_of(tmp_path / "out") == file_bytes(tokens)
    assert files_of(tmp_path / "out_labels") == file_bytes(labels, "int32")
    assert report.dropped() == [f"{tmp_path}/a.jsonl: 1 dropped, empty (line 3)"]


def test_prepared_prompts_train_on_their_responses_alone(tmp_path: Path) -> None:
    rows = [{"q": "x" * draw, "a": "y" * (1 + draw % 5)} for draw in range(1, 60)]
    write_packed(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    quietly([tmp_path / "a.jsonl"], tmp_path / "out", Recipe(prompt="{q}", response_key="a", append_eod=True))
    entry = {"path": str(tmp_path / "out"), "weight": 1.0, "labels": str(tmp_path / "out_labels")}
    for packing in ("packed", "pack_until_overflow", "unpacked"):
        data = datasets([entry], packing=packing, split="1")  # type: ignore[arg-type]
        seen = {int(token) for step in steps_of(data) for token in step.model_fields["targets_BT"].unique()}
        assert seen == {-100, ord("y"), END}


def test_prompts_from_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="--prompt reads prompts and responses from .jsonl files"):
        quietly([tmp_path / "a.txt"], tmp_path / "out", Recipe(prompt="{q}"))


def test_faulty_lines_are_counted_and_named_across_parts(tmp_path: Path) -> None:
    lines = jsonl(texts(1, 60)).splitlines(keepends=True)
    faults = {3: b"{\n", 17: b'{"body": ""}\n', 40: b"{{\n", 41: b"[\n", 50: b'{"text": ""}\n', 57: b"1\n"}
    for number, line in faults.items():
        lines[number - 1] = line
    write_packed(tmp_path / "a.jsonl", b"".join(lines))
    report = quietly([tmp_path / "a.jsonl"], tmp_path / "out", workers=2, share=0.1)
    assert report.documents == 54 and report.bad_share() == 5 / 60
    path = f"{tmp_path}/a.jsonl"
    assert sorted(report.dropped()) == sorted(
        [
            f"{path}: 3 dropped, not JSON (line 3, 40, 41)",
            f"{path}: 1 dropped, no key 'text' (line 17)",
            f"{path}: 1 dropped, empty (line 50)",
            f"{path}: 1 dropped, not a JSON object (line 57)",
        ]
    )


def test_a_line_that_is_too_large_to_read_is_a_faulty_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(documents, "SMALLEST_PART_BYTES", 1 << 20)
    digits, brackets = b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n", b'{"text": ' + b"[" * 200_000 + b"\n"
    write_packed(tmp_path / "a.jsonl", jsonl(["one"]) + digits + brackets + jsonl(["x" * 300_000]) + jsonl(["two"]))
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--max-bad", "1", "--output", str(tmp_path / "out")]
    prepare_data.main([*arguments, "--max-line-mb", "0.25"])
    assert files_of(tmp_path / "out") == file_bytes([[*b"one"], [*b"two"]])
    printed = capsys.readouterr().out
    for fault in "not JSON (line 2)", "nested too deeply (line 3)", "longer than 250,000 bytes (line 4)":
        assert f"a.jsonl: 1 dropped, {fault}" in printed
    for size in "0", "-1", "nan", "inf":
        with pytest.raises(UserError, match="--max-line-mb .* must be a number above 0"):
            prepare_data.main([*arguments, f"--max-line-mb={size}"])


def test_many_faults_are_counted_and_the_first_named() -> None:
    piece = PieceReport("a.jsonl")
    for _ in range(7):
        piece.lines += 1
        piece.drop("not JSON")
    assert Report(pieces=[piece]).dropped() == ["a.jsonl: 7 dropped, not JSON (line 1, 2, 3, 4, 5, ...)"]


def test_too_many_faults_are_an_error_and_finished_parts_are_kept(tmp_path: Path) -> None:
    write_packed(tmp_path / "a.jsonl", jsonl(texts(1, 60)) + b"{\n")
    with pytest.raises(
        UserError,
        match=r"1\.64% of the lines are faulty, --max-bad allows 1%: .*a\.jsonl: 1 dropped, not JSON \(line 61\)",
    ):
        quietly([tmp_path / "a.jsonl"], tmp_path / "out", share=0.01)
    assert not list(tmp_path.glob("out*.idx")) and not list(tmp_path.glob("out*.bin"))
    folder = tmp_path / "out.parts"
    reports = sorted(folder.glob("*.json"))
    written = {path: path.stat().st_mtime_ns for path in folder.glob("part-*.bin")}
    missing = reports[2]
    missing.unlink()
    messages: list[str] = []

    def recording(message: str) -> None:
        messages.append(message)
        if "earlier run" in message:
            stale = {path: path.stat().st_mtime_ns for path in written}
            assert stale == written

    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", Recipe(), workers=1, max_bad_share=0.5, log=recording)
    assert messages[0] == f"{len(reports) - 2} of {len(reports) - 1} parts are there from an earlier run"
    assert files_of(tmp_path / "out") == file_bytes([list(text.encode()) for text in texts(1, 60)])
    assert not folder.exists()


def test_mending_the_input_as_the_sentence_says_leads_on(tmp_path: Path) -> None:
    write_packed(tmp_path / "a.jsonl", jsonl(["x"]) + b"{\n")
    with pytest.raises(UserError, match=r"or mend the input and remove (.*) first\.") as error:
        quietly([tmp_path / "a.jsonl"], tmp_path / "out")
    write_packed(tmp_path / "a.jsonl", jsonl(["x", "y"]))
    shutil.rmtree(str(error.value).rsplit(" remove ", 1)[1].removesuffix(" first."))
    quietly([tmp_path / "a.jsonl"], tmp_path / "out")
    assert files_of(tmp_path / "out") == file_bytes([[*b"x"], [*b"y"]])


def test_a_file_that_is_not_utf8_is_dropped_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 4)
    (tmp_path / "src").mkdir()
    for name, content in {"1": b"one", "2": b"two\nthree\n\xff", "3": b"", "4": b"four"}.items():
        (tmp_path / "src" / name).write_bytes(content)
    report = quietly([tmp_path / "src"], tmp_path / "out", share=0.5)
    assert files_of(tmp_path / "out") == file_bytes([list(b"one"), list(b"four")])
    assert report.dropped() == [f"{tmp_path}/src/2: 1 dropped, not UTF-8", f"{tmp_path}/src/3: 1 dropped, empty"]
    assert report.text_bytes == 7


def test_progress_names_rates_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRESS_SECONDS", -1.0)
    messages: list[str] = []
    progress = module.Progress(4_000_000, messages.append)
    progress.add(1_000_000, 500)
    assert messages[0].startswith("25% of 3.81 MiB, ") and "iB/s, " in messages[0] and "tokens/s" in messages[0]
    assert messages[0].endswith(" s left")


def test_the_last_word_on_progress_is_said_however_fast_it_was() -> None:
    messages: list[str] = []
    progress = module.Progress(4_000_000, messages.append)
    progress.add(3_000_000, 500)
    progress.add(1_000_000, 500)
    assert len(messages) == 1 and messages[0].startswith("100% of 3.81 MiB, ")


def test_joined_files_are_the_documents_of_all(tmp_path: Path) -> None:
    parts = [random_documents(seed, 7) for seed in range(3)]
    prefixes = [Path(write_files(tmp_path / f"part{number}", part)) for number, part in enumerate(parts)]
    assert join(prefixes, tmp_path / "all") == sum(len(document) for part in parts for document in part)
    assert files_of(tmp_path / "all") == file_bytes(sum(parts, []))


def test_files_of_different_types_are_not_joined(tmp_path: Path) -> None:
    prefixes = [Path(write_files(tmp_path / dtype, [[1]], dtype)) for dtype in ("uint16", "int32")]
    with pytest.raises(
        UserError, match="int32 stores int32 tokens and .*uint16 uint16; prepare them with one tokenizer"
    ):
        join(prefixes, tmp_path / "all")
    assert not (tmp_path / "all.idx").exists()


def test_the_command_prepares_and_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_packed(tmp_path / "a.jsonl", jsonl(["one", "two", ""], key="body"))
    out = str(tmp_path / "out")
    prepare_data.main(["--input", str(tmp_path / "a.jsonl"), "--key", "body", "--append-eod", "--output", out])
    printed = capsys.readouterr().out
    assert "2 documents, 8 tokens, 0.750 bytes per token" in printed and "1 dropped, empty (line 3)" in printed
    prepare_data.main(["--merge", out, out, "--output", str(tmp_path / "twice")])
    assert files_of(tmp_path / "twice") == file_bytes([[*b"one", END], [*b"two", END]] * 2)
    with pytest.raises(UserError, match="twice.idx exists already"):
        prepare_data.main(["--merge", out, "--output", str(tmp_path / "twice")])
    with pytest.raises(UserError, match="--workers 0 must be a whole number of at least 1"):
        prepare_data.main(["--input", str(tmp_path / "a.jsonl"), "--workers", "0", "--output", out + "2"])


def test_a_mistake_prints_a_sentence_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, prepare_data.__file__, "--input", "no/such", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(prepare_data.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "names no file" in done.stderr and "Traceback" not in done.stderr
