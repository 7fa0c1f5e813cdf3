"""The tool names exactly the rows, documents and hashes that training reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from neox_native.data.loader import build_loader, format_hash
from neox_native.errors import UserError
from tests.data.corpora import random_documents, write_files
from tools import show_batch

BATCH, SEQ_LENGTH, STEPS = 12, 8, 7


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    """Arguments that name a small mixture of two files."""
    for name in ("a", "b"):
        write_files(tmp_path / name, random_documents(ord(name), 40))
    lines = [
        "[run]\nseed = 5",
        f"[model]\nvocab_size = 300\nseq_length = {SEQ_LENGTH}",
        f'[data]\ntrain = [{{path = "{tmp_path}/a", weight = 1.0}}, {{path = "{tmp_path}/b", weight = 2.0}}]',
        f"[training]\nsteps = {STEPS}\nglobal_batch_size = {BATCH}\nmicro_batch_size = 2",
    ]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    return ["--config", str(tmp_path / "run.toml")]


def answers(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    capsys.readouterr()
    show_batch.main([*arguments, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def training_steps(config: list[str], rank: int = 0, dp: int = 1) -> list:
    dataset = show_batch.training_data(show_batch.from_command_line(config))
    loader = build_loader(
        dataset,
        consumed_samples=0,
        global_batch_size=BATCH,
        micro_batch_size=2,
        dp_rank=rank,
        dp_size=dp,
        stop_after_steps=STEPS,
    )
    return list(loader)


def test_the_rows_of_a_step_are_those_of_training(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for number, step in enumerate(training_steps(config), start=1):
        rows = answers([*config, "--step", str(number)], capsys)
        assert [row["row"] for row in rows] == list(range(BATCH)) and all(row["step"] == number for row in rows)
        assert [row["sample"] for row in rows] == list(range(step.consumed_samples - BATCH, step.consumed_samples))
        assert [row["tokens"][:-1] for row in rows] == step.model_fields["tokens_BT"].flatten(0, 1).tolist()


def test_document_and_offset_are_those_of_the_first_token(
    config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for row in answers([*config, "--step", "2"], capsys):
        documents = random_documents(ord(str(row["dataset"])[-1]), 40)
        assert documents[row["document"]][row["offset"]] == row["tokens"][0]
        assert set(row) == {"step", "row", "sample", "dataset", "document", "offset", "tokens"}


@pytest.mark.parametrize("rank", range(3))
def test_the_rows_of_a_rank_are_those_it_reads(
    config: list[str], capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    step = training_steps(config, rank, 3)[3]
    rows = answers([*config, "--step", "4", "--rank", str(rank), "--parallel.dp", "3"], capsys)
    assert [row["tokens"][:-1] for row in rows] == step.model_fields["tokens_BT"].flatten(0, 1).tolist()


def test_hashes_are_those_that_training_logs(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shown = answers([*config, "--hash", f"1:{STEPS}"], capsys)
    assert [row["batch_hash"] for row in shown] == [format_hash(step.row_hash) for step in training_steps(config)]
    assert [row["step"] for row in shown] == list(range(1, STEPS + 1))


def test_a_document_is_found_in_every_row_that_holds_it(
    config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = show_batch.training_data(show_batch.from_command_line(config))
    for document in range(0, 40, 7):
        expected = []
        for sample in range(STEPS * BATCH):
            place = dataset.locate(sample)
            if place.dataset.endswith("b") and any(segment.document == document for segment in place.segments):
                expected.append({"step": sample // BATCH + 1, "row": sample % BATCH, "sample": sample})
        question = ["--document", str(document), "--dataset", str(tmp_path / "b")]
        assert answers([*config, *question], capsys) == expected


def test_a_position_may_be_given_where_the_batch_size_changed(
    config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = answers([*config, "--step", "4", "--consumed", "30"], capsys)
    assert [row["sample"] for row in rows] == list(range(30, 42))


def test_text_is_shown_for_people(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prefix = write_files(tmp_path / "text", [list(b"Es war einmal ein Text. " * 40)])
    options = ["--model.vocab_size", "257", "--model.seq_length", "8", "--training.global_batch_size", "2"]
    options += ["--training.steps", "3", "--data.train", prefix, "--data.split", "1"]
    (tmp_path / "run.toml").write_text("")
    show_batch.main(["--config", str(tmp_path / "run.toml"), *options, "--step", "1"])
    first, text = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("step 1  row 0  sample 0  dataset ") and "document 0" in first
    assert text.strip().strip("'") in "Es war einmal ein Text. " * 2
    show_batch.main(["--config", str(tmp_path / "run.toml"), *options, "--hash", "2:3"])
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["step", "2"], ["step", "3"]]


@pytest.mark.parametrize(
    "question, sentence",
    [
        (["--step", "0"], "step 0 is not there: steps go from 1 to 7"),
        (["--step", "8"], "step 8 is not there: steps go from 1 to 7"),
        (["--hash", "7"], "--hash '7' must be two steps such as 1:20"),
        (["--step", "4", "--consumed", "-5"], "--consumed -5 is not there: .* 12 samples starts between 0 and 72"),
        (["--step", "4", "--consumed", "73"], "--consumed 73 is not there: .* 12 samples starts between 0 and 72"),
        (["--step", "0", "--consumed", "5"], "step 0 with --consumed 5 is not there: steps count from 1"),
        (["--hash", "3:1"], "--hash '3:1' ends before it starts; say 1:3"),
        (["--hash", "1:2", "--rank", "0"], "--rank belongs to --step"),
        (["--document", "1", "--rank", "0"], "--rank belongs to --step"),
        (["--hash", "1:2", "--consumed", "0"], "--consumed belongs to --step"),
        (["--step", "1", "--dataset", "a"], "--dataset belongs to --document"),
        (["--document", "3"], "--document 3 is in which file.* --dataset, one of .*a, .*b"),
        (["--document", "3", "--dataset", "c"], "--dataset 'c' is none of the training data"),
        (["--step", "1", "--rank", "0"], "--rank 0 is not one of parallel.dp = -1 data ranks"),
        (["--step", "1", "--rank", "1", "--parallel.dp", "5"], "does not divide into .* times parallel.dp = 5"),
    ],
)
def test_a_question_without_an_answer_is_refused(config: list[str], question: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        show_batch.main([*config, *question])


@pytest.mark.parametrize("document", [-1, 39, 99999])
def test_a_document_that_training_never_reads_is_refused(config: list[str], tmp_path: Path, document: int) -> None:
    question = [f"--document={document}", "--dataset", str(tmp_path / "b")]
    with pytest.raises(UserError, match=f"--document {document} is not read: the training data is 0 to 38 of .*b"):
        show_batch.main([*config, *question])


def test_a_malformed_mixture_is_refused_as_in_training(config: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.train\[0\] = .* must have a path and a weight above 0"):
        show_batch.main([*config, "--step", "1", '--data.train=[{path = "a", weight = "x"}]'])


def test_ids_that_the_tokenizer_lacks_are_refused_as_text_and_shown_as_numbers(
    config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    largest = max(answers([*config, "--step", "1"], capsys)[0]["tokens"])
    assert largest > 256
    with pytest.raises(UserError, match=f"data.tokenizer = 'byte' has no text for .* ids up to {largest}: name the"):
        show_batch.main([*config, "--step", "1"])


def test_tokens_are_whole_samples(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (step,) = training_steps(config)[:1]
    rows = answers([*config, "--step", "1"], capsys)
    assert torch.equal(torch.tensor([row["tokens"] for row in rows])[:, 1:], step.model_fields["targets_BT"].flatten(0, 1))
