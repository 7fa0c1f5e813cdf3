"""A mistake on a tool's command line is one sentence and exit status 1."""

from __future__ import annotations

import importlib
import types
from pathlib import Path

import pytest

from neox_native.errors import UserError, report_user_errors


def tool(name: str) -> types.ModuleType:
    return importlib.import_module(f"tools.{name}")


EVALUATE = ["evaluate", "--checkpoint", "c", "--data", "d"]
GENERATE = ["generate", "--checkpoint", "c", "--prompt", "p"]
PREPARE = ["prepare_data", "--input", "i", "--output", "o"]
NUMBERS = [
    (["convert", "to-hf", "c", "o", "--shard-gb"], ["0", "-1", "nan", "inf"], "a number above 0"),
    (["convert", "from-neox", "c", "o", "--vocab-size"], ["0"], "a whole number of at least 1"),
    ([*EVALUATE, "--documents"], ["-1", "x"], "a whole number of at least 0"),
    ([*EVALUATE, "--stride"], ["-1"], "a whole number of at least 0"),
    ([*EVALUATE, "--limit"], ["0", "1.5"], "a whole number of at least 1"),
    ([*EVALUATE, "--num-fewshot"], ["-1"], "a whole number of at least 0"),
    ([*EVALUATE, "--batch-size"], ["0", "-1"], "a whole number of at least 1"),
    ([*GENERATE, "--samples"], ["0", "9" * 30], "a whole number of at least 1"),
    ([*GENERATE, "--max-new-tokens"], ["-1"], "a whole number of at least 1"),
    ([*GENERATE, "--top-k"], ["-1"], "a whole number of at least 0"),
    ([*GENERATE, "--top-p"], ["0", "2", "nan"], "a number above 0 and at most 1"),
    ([*GENERATE, "--temperature"], ["-1", "nan"], "a number of at least 0"),
    ([*GENERATE, "--repetition-penalty"], ["0"], "a number above 0"),
    ([*GENERATE, "--seed"], ["x"], "a whole number"),
    ([*GENERATE, "--tp"], ["0"], "a whole number of at least 1"),
    ([*GENERATE, "--pp"], ["0", "-1"], "a whole number of at least 1"),
    (["show_schedule", "--gpus-per-node"], ["0"], "a whole number of at least 1"),
    (["show_batch", "--step"], ["x"], "a whole number"),
    ([*PREPARE, "--workers"], ["0"], "a whole number of at least 1"),
    ([*PREPARE, "--max-bad"], ["-0.1", "1.5", "nan"], "a number of at least 0 and at most 1"),
]


@pytest.mark.parametrize("words, values, wanted", NUMBERS, ids=lambda value: value[-1] if isinstance(value, list) else None)
def test_a_number_that_cannot_be_is_refused(
    words: list[str], values: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in values:
        with pytest.raises(SystemExit) as left, report_user_errors():
            tool(words[0]).main([*words[1:], value])
        told = capsys.readouterr().err
        assert left.value.code == 1
        assert told.startswith(f"error: {words[-1]} {value} must be {wanted}; ") and told.endswith("--help lists the options.\n")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["benchmark", "--speed"], "Unrecognized arguments: --speed"),
        (["benchmark", "--data", "--peers"], "--peers: not allowed with argument --data"),
        (["compare", "a"], "The following arguments are required: B"),
        (["convert"], "The following arguments are required: to-hf | from-hf | from-neox"),
        (["convert", "to-hf", "c"], "The following arguments are required: OUT"),
        (["evaluate", "--checkpoint", "c"], "One of the arguments --data --text --tasks is required"),
        ([*GENERATE, "--dtype", "int4"], "--dtype: invalid choice: 'int4'"),
        ([*GENERATE, "--seed"], "--seed: expected one argument"),
        (["plan", "serach"], "COMMAND: invalid choice: 'serach'"),
        (["show_schedule", "--format", "png"], "--format: invalid choice: 'png'"),
    ],
    ids=" ".join,
)
def test_what_argparse_refuses_is_a_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        tool(words[0]).main(words[1:])
    assert str(refused.value).startswith(sentence) and " --help lists the options." in str(refused.value)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["prepare_data", "--input", __file__, "--tokenizer", "no.json", "--output", "OUT"], "--tokenizer = 'no.json' is neither"),
        (
            ["plan", "calibrate", "--config", "configs/quickstart.toml", "--like", "V9", "--write", "OUT"],
            "--like 'V9' is not known",
        ),
        (
            ["plan", "dry-run", "--config", "configs/20b.toml", "--world-size", "7"],
            "pp(4) * dp(8) * tp(2) = 64 ranks, but --world-size is 7",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_sentence_names_the_option_that_was_given(words: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        tool(words[0]).main([str(tmp_path / "out") if word == "OUT" else word for word in words[1:]])
    assert str(refused.value).startswith(sentence)
    assert not list(tmp_path.iterdir())
