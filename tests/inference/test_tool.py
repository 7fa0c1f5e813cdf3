from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace

import pytest

from neox_native.data.tokenizers import byte_tokenizer
from neox_native.errors import UserError
from neox_native.inference import command
from neox_native.inference.generator import Limits
from neox_native.inference.sampling import Sampling
from tests.inference.models import PROMPTS, answers, one_process
from tests.interop.models import SMALL, checkpoint
from tests.ranks import run_ranks
from tools import generate

EIGHT = ["--max-new-tokens", "8", "--ignore-end", "--device", "cpu"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("run") / "checkpoints" / "step_000000007", tokenizer="byte", step=7)


@pytest.fixture(scope="module")
def expected(path):
    with one_process():
        rows = answers(path, Sampling(), Limits(8, ignore_end=True, logprobs=True))
    return rows


def output(capsys, *arguments) -> str:
    generate.main([*map(str, arguments), *EIGHT])
    return capsys.readouterr().out


def test_a_run_folder_means_its_newest_checkpoint_and_one_prompt_is_streamed(path, expected, capsys):
    found = output(capsys, "--checkpoint", path.parent.parent, "--prompt", PROMPTS[0])
    assert found == PROMPTS[0] + expected[0].text + "\n"


def test_prompts_from_a_file_come_back_as_json_lines(path, expected, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    arguments = ["--checkpoint", path, "--prompts", tmp_path / "prompts.jsonl", "--logprobs", "--batch-size", 3]
    lines = [json.loads(line) for line in output(capsys, *arguments).splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    for line, row in zip(lines, expected):
        assert (line["tokens"], line["text"], line["finish"]) == (row.new_tokens, row.text, "length")
        assert line["logprobs"] == pytest.approx(row.logprobs, abs=1e-5)


def test_several_samples_are_told_apart(path, capsys):
    arguments = ["--checkpoint", path, "--prompt", "ab", "--samples", 3, "--temperature", 1.5, "--json"]
    lines = [json.loads(line) for line in output(capsys, *arguments).splitlines()]
    assert [line["sample"] for line in lines] == [0, 1, 2] and len({line["text"] for line in lines}) == 3


def test_without_prompts_it_asks(path, expected, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPTS[0]}\n{PROMPTS[1]}\n"))
    found = output(capsys, "--checkpoint", path)
    shown = "".join(f"prompt> {PROMPTS[n]}{expected[n].text}\n" for n in (0, 1))
    assert found == shown + "prompt> "


@pytest.mark.parametrize("layout", [[], ["--pp", "2"]], ids=["all processes are tp", "pp 2"])
def test_on_a_mesh_only_the_first_process_prints(path, expected, layout):
    def on_rank() -> str:
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            for name in ("start_process_group", "leave_process_group"):  # the test's ranks have joined already
                patch.setattr(command, name, lambda *_: None)
            generate.main(["--checkpoint", str(path), "--prompt", PROMPTS[0], *EIGHT, *layout])
        return printed.getvalue()

    assert run_ranks(2, on_rank) == [PROMPTS[0] + expected[0].text + "\n", ""]


def test_an_answer_typed_in_another_encoding_is_refused(path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="is not valid UTF-8"):
        output(capsys, "--checkpoint", path)


def test_what_cannot_work_is_a_sentence(path, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "empty.txt").write_text("")
    small = checkpoint(tmp_path / "small", replace(SMALL, vocab_size=100), tokenizer="byte")
    nameless = checkpoint(tmp_path / "nameless")
    for arguments, sentence in (
        (["--checkpoint", path, "--prompt", "x" * 40], "has 40 tokens.*model.seq_length = 32"),
        (["--checkpoint", path, "--prompt", "\udcff"], "is not valid UTF-8"),
        (["--checkpoint", path, "--prompts", tmp_path / "none.txt"], "none.txt cannot be read"),
        (["--checkpoint", path, "--prompts", tmp_path / "bad.jsonl"], 'line 2: is no JSON object with a "prompt"'),
        (["--checkpoint", path, "--prompts", tmp_path / "empty.txt"], "holds no prompt"),
        (["--checkpoint", path, "--prompt", "a", "--batch-size", 0], "--batch-size 0 must be"),
        (["--checkpoint", path, "--prompt", "a", "--tp", 2], r"pp\(1\) \* tp\(2\) = 2 ranks.*1 processes"),
        (["--checkpoint", tmp_path / "none", "--prompt", "a"], "does not exist"),
        (["--checkpoint", tmp_path, "--prompt", "a"], "holds no checkpoint"),
        (
            ["--checkpoint", small, "--prompt", "a"],
            "'byte' has 257 ids, but the model's vocabulary has model.vocab_size = 100",
        ),
        (["--checkpoint", nameless, "--prompt", "a"], "does not say which tokenizer.*--tokenizer"),
    ):
        with pytest.raises(UserError, match=sentence):
            output(capsys, *arguments)
    assert byte_tokenizer().name in output(capsys, "--checkpoint", nameless, "--prompt", "byte", "--tokenizer", "byte")
