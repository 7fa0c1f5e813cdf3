from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from neox_native.data.indexed import IndexedWriter
from neox_native.data.sidecar import Vocabulary, about
from neox_native.data.tokenizers import byte_tokenizer
from neox_native.errors import UserError
from neox_native.evaluation.choices import accuracy, pair, read_questions
from neox_native.evaluation.perplexity import measure
from neox_native.inference.score import Scorer, Window, windows
from tests.inference.models import MODELS, checkpoints, one_process, runner, scores
from tests.interop.models import built, draw
from tests.ranks import run_ranks
from tools import evaluate

LENGTHS = [2, 7, 1, 33, 34, 80, 0, 100]
DOCUMENTS = [np.random.RandomState(n).randint(0, 256, length).astype(np.uint16) for n, length in enumerate(LENGTHS)]
WINDOWS = [Window(document[:33], max(1, len(document[:33]) // 2)) for document in DOCUMENTS if len(document) > 1]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return checkpoints(tmp_path_factory.mktemp("models"))


def by_hand(model, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every token but the first, and whether it is the most probable one."""
    with torch.no_grad():
        logits = built(model, draw(model)).eval()(torch.tensor(np.asarray(tokens[:-1], np.int64))[None])[0]
    targets = torch.tensor(np.asarray(tokens[1:], np.int64))
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].double(), logits.argmax(-1) == targets


@pytest.mark.parametrize("stride", [1, 5, 32])
def test_windows_predict_every_token_but_the_first_once_in_enough_context(stride):
    for document in DOCUMENTS:
        found, last = [], 1
        for window in windows(document, 32, stride):
            assert 1 <= window.predicted < len(window.tokens) <= 33
            found += list(window.tokens[-window.predicted :])
            context, before = len(window.tokens) - window.predicted, last
            last += window.predicted
            assert context >= min(before, 32 - stride + 1)
        assert found == list(document[1:])


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_each_window_alone_on_every_mesh(paths, name):
    expected = []
    for window in WINDOWS:
        logprobs, _ = by_hand(MODELS[name], window.tokens)
        expected.append(logprobs[-window.predicted :].sum().item())
    for pp, tp in ((1, 1), (2, 2)):
        for found in run_ranks(pp * tp, scores, paths[name], WINDOWS, pp, tp):
            assert [score.logprob for score in found] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_greedy_continuation_is_recognised(paths, tp):
    model, tokens = MODELS["rotary"], [100, 101]
    network = built(model, draw(model)).eval()
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(network(torch.tensor([tokens]))[0, -1].argmax()))
    changed = tokens[:-1] + [(tokens[-1] + 1) % 256]
    for found in run_ranks(
        tp, scores, paths["rotary"], [Window(tokens, 6), Window(changed, 6), Window(changed, 1)], 1, tp
    ):
        assert [score.greedy for score in found] == [True, False, False]


def expected_loss(stride: int) -> tuple[float, int]:
    total, count = 0.0, 0
    for document in DOCUMENTS:
        for window in windows(document, 32, stride):
            logprobs, _ = by_hand(MODELS["rotary"], window.tokens)
            total -= logprobs[-window.predicted :].sum().item()
            count += window.predicted
    return total / count, count


def write(prefix, documents=DOCUMENTS) -> str:
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def evaluated(capsys, *arguments) -> dict:
    evaluate.main([*map(str, arguments), "--json", "--device", "cpu"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("stride", [0, 4])
def test_the_tool_prints_the_mean_loss_of_a_prepared_dataset(paths, tmp_path, capsys, stride):
    found = evaluated(capsys, "--checkpoint", paths["rotary"], "--data", write(tmp_path / "data"), "--stride", stride)
    loss, count = expected_loss(stride or 32)
    assert found["tokens"] == count == sum(max(0, length - 1) for length in LENGTHS)
    assert found["loss"] == pytest.approx(loss, rel=1e-6)


def test_a_text_is_measured_per_token_byte_and_word(paths, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich")
    found = evaluated(capsys, "--checkpoint", paths["rotary"], "--text", tmp_path / "text.txt")
    size = len((tmp_path / "text.txt").read_bytes())
    assert (found["tokens"], found["bytes"], found["words"]) == (size, size, 9)
    assert found["byte_perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))
    assert found["word_perplexity"] == pytest.approx(math.exp(found["loss"] * size / 9))


def test_multiple_choice_is_scored_from_a_file(paths, tmp_path, capsys):
    model, questions, right, right_per_byte = MODELS["rotary"], [], 0, 0
    for number in range(6):
        context, choices = f"question {number}:", [" a", " banana", " fig" * 2]
        logprobs = []
        for choice in choices:
            tokens = list((context + choice).encode())
            logprobs.append(by_hand(model, tokens)[0][-len(choice) :].sum().item())
        per_byte = [logprob / len(choice) for logprob, choice in zip(logprobs, choices)]
        answer = number % 3
        right += logprobs.index(max(logprobs)) == answer
        right_per_byte += per_byte.index(max(per_byte)) == answer
        questions.append({"context": context, "choices": choices, "answer": answer})
    file = tmp_path / "task.jsonl"
    file.write_text("\n".join(map(json.dumps, questions)))
    found = evaluated(capsys, "--checkpoint", paths["rotary"], "--tasks", file)
    assert found == {"acc": right / 6, "acc_norm": right_per_byte / 6, "questions": 6}


def test_a_context_and_its_continuation_are_cut_where_the_whole_is_encoded():
    tokenizer = byte_tokenizer()
    assert pair(tokenizer, "a b ", "c") == (list(b"a b"), list(b" c"))
    assert pair(tokenizer, "", "c") == ([256], list(b"c"))


def test_files_and_settings_that_cannot_work_are_refused(paths, tmp_path):
    bad = tmp_path / "bad.jsonl"
    for line in ('{"context": "a", "choices": ["b"], "answer": 1}', '{"context": "a"}', "no json", '["a"]'):
        bad.write_text("\n" + line)
        with pytest.raises(UserError, match="bad.jsonl, line 2"):
            read_questions(bad)
    bad.write_text("\n")
    with pytest.raises(UserError, match="holds no question"):
        read_questions(bad)
    large = write(tmp_path / "large", [np.array([1, 300], np.uint16)])
    other = Vocabulary("other", "0" * 64, 200, 0)
    with IndexedWriter(tmp_path / "other", np.uint16, about(other, {})) as writer:
        writer.add_document(np.array([1, 2]))
    for arguments, sentence in (
        (["--data", str(tmp_path / "other")], r"was made with the tokenizer other .* but the tokenizer of .* is byte \("),
        (["--tasks", str(tmp_path / "none.jsonl")], "none.jsonl cannot be read"),
        (["--data", large], "document 0 holds the id 300.*model.vocab_size = 257"),
        (["--data", write(tmp_path / "empty", [np.array([1], np.uint16)])], "nothing to predict"),
        (["--data", large, "--stride", "33"], "--stride 33 must lie between 1 and the model's context"),
        (["--text", str(tmp_path / "none.txt")], "none.txt cannot be read"),
    ):
        with pytest.raises(UserError, match=sentence):
            evaluate.main(["--checkpoint", str(paths["rotary"]), "--device", "cpu", *arguments])
    with one_process(), pytest.raises(UserError, match="continuation of 40 tokens"):
        scorer = Scorer(runner(paths["rotary"]))
        (tmp_path / "long.jsonl").write_text(json.dumps({"context": "a", "choices": ["b" * 40], "answer": 0}))
        accuracy(scorer, byte_tokenizer(), read_questions(tmp_path / "long.jsonl"))


def test_ends_of_documents_are_no_text(paths):
    with one_process():
        found = measure(Scorer(runner(paths["rotary"])), [np.array([256, 97, 32, 98, 256])], 32, byte_tokenizer())
    assert (found.tokens, found.text_bytes, found.words) == (4, 3, 2)
