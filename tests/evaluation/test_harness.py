"""The adapter for lm-evaluation-harness against hand computations, on a task that needs no network."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from neox_native.errors import UserError
from tests.evaluation.test_score import by_hand
from tests.inference.models import checkpoints, one_process, runner
from tests.interop.models import SMALL
from tools import evaluate

TASK = """
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
"""
QUESTIONS = [
    {"question": f"The colour of {thing} is", "choices": ["red", "green", "dark blue"], "label": number % 3}
    for number, thing in enumerate(["blood", "grass", "the sky", "a rose", "a leaf", "the sea"])
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoints(tmp_path_factory.mktemp("models"))["rotary"]


@pytest.fixture
def model(path):
    from neox_native.data.tokenizers import byte_tokenizer
    from neox_native.evaluation.harness import HarnessModel
    from neox_native.inference.generator import Generator
    from neox_native.inference.score import Scorer

    with one_process():
        on_mesh = runner(path)
        yield HarnessModel(Generator(on_mesh, byte_tokenizer()), Scorer(on_mesh, 4))


def requests(*arguments) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=each) for each in arguments]


def test_a_tiny_task_scores_what_a_hand_computation_gives(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(file=tmp_path / "tiny.jsonl"))
    arguments = [
        "--checkpoint",
        str(path),
        "--tasks",
        "tiny",
        "--include-path",
        str(tmp_path / "tasks"),
        "--device",
        "cpu",
    ]
    evaluate.main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["tiny"]
    right = right_per_byte = 0
    for question in QUESTIONS:
        logprobs = []
        for choice in question["choices"]:
            tokens = list(f"{question['question']} {choice}".encode())[-33:]
            logprobs.append(by_hand(SMALL, tokens)[0][-len(choice) - 1 :].sum().item())
        per_byte = [logprob / len(choice) for logprob, choice in zip(logprobs, question["choices"])]
        right += logprobs.index(max(logprobs)) == question["label"]
        right_per_byte += per_byte.index(max(per_byte)) == question["label"]
    assert found["acc"] == pytest.approx(right / 6) and found["acc_norm"] == pytest.approx(right_per_byte / 6)


def test_an_unknown_task_is_refused(path):
    with pytest.raises(UserError, match="has no task colours"):
        evaluate.main(["--checkpoint", str(path), "--tasks", "colours", "--device", "cpu"])


def test_loglikelihood_equals_a_hand_computation(model):
    pairs = [("abc", " def"), ("", "xyz"), ("x" * 60, "yz")]
    found = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(pairs, found):
        tokens = ([*context.encode()] or [256]) + [*continuation.encode()]
        logprobs, best = by_hand(SMALL, tokens[-33:])
        size = len(continuation)
        assert logprob == pytest.approx(logprobs[-size:].sum().item(), rel=1e-5)
        assert greedy == bool(best[-size:].all())


def test_rolling_loglikelihood_predicts_every_token_once(model):
    text = "the quick brown fox jumps over the lazy dog " * 3
    (found,) = model.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    tokens, expected = [256, *text.encode()], 0.0
    for first in range(0, len(text), 32):
        last = min(first + 32, len(text))
        start = first if last - first == 32 else last - 32  # the last window fills its context with earlier tokens
        expected += by_hand(SMALL, tokens[start : last + 1])[0][-(last - first) :].sum().item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_generate_until_stops_and_keeps_the_order(model):
    greedy = {"until": [], "max_gen_toks": 8, "do_sample": False}
    prompts = ["def f", "a", "import os"]
    free = model.generate_until(requests(*((prompt, greedy) for prompt in prompts)), disable_tqdm=True)
    alone = [model.generate_until(requests((prompt, greedy)), disable_tqdm=True)[0] for prompt in prompts]
    assert free == alone
    stop = free[0][2]
    (stopped,) = model.generate_until(requests((prompts[0], greedy | {"until": [stop]})), disable_tqdm=True)
    assert stopped == free[0].split(stop)[0]
    (long,) = model.generate_until(requests(("x" * 100, greedy)), disable_tqdm=True)
    assert isinstance(long, str)


def test_without_lm_eval_the_extra_is_named(monkeypatch, tmp_path):
    import sys

    path = checkpoints(tmp_path)["rotary"]
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"] + ["neox_native.evaluation.harness"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r"\.\[eval\]"):
        evaluate.main(["--checkpoint", str(path), "--tasks", "piqa", "--device", "cpu"])
    assert torch.is_grad_enabled()
