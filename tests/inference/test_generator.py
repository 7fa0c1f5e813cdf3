from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from neox_native.data.tokenizers import byte_tokenizer
from neox_native.errors import UserError
from neox_native.inference.generator import Generator, Limits
from neox_native.inference.sampling import Sampling
from tests.inference.models import MODELS, PROMPTS, answers, checkpoints, one_process, runner
from tests.interop.models import built, checkpoint, draw
from tests.ranks import run_ranks

GREEDY, TEN = Sampling(), Limits(max_new_tokens=10, ignore_end=True)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return checkpoints(tmp_path_factory.mktemp("models"))


def by_hand(model, prompt: str, count: int) -> list[int]:
    """Greedy tokens of one prompt through the bare model, without a cache, a batch or a mesh."""
    network, tokens = built(model, draw(model)).eval(), list(prompt.encode()) or [256]
    first = len(tokens)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(network(torch.tensor([tokens]))[0, -1, : model.vocab_size].argmax()))
    return tokens[first:]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_same_with_and_without_cache_and_batch(paths, name):
    expected = [by_hand(MODELS[name], prompt, 10) for prompt in PROMPTS]
    with one_process():
        for use_cache in (True, False):
            rows = answers(paths[name], GREEDY, TEN, use_cache=use_cache)
            assert [row.new_tokens for row in rows] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1


WIDE = [pytest.param(name, 2, 2, marks=[] if name == "tied" else pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name, pp, tp", [("grouped swiglu", 1, 2), ("rotary", 3, 1), *WIDE])
def test_greedy_tokens_are_the_same_on_every_mesh(paths, name, pp, tp):
    expected = [by_hand(MODELS[name], prompt, 10) for prompt in PROMPTS]

    def on_rank():
        return [row.new_tokens for use in (True, False) for row in answers(paths[name], GREEDY, TEN, pp, tp, use)]

    for found in run_ranks(pp * tp, on_rank):
        assert found == expected * 2


def test_drawn_tokens_are_the_same_on_a_mesh_and_in_another_batch(paths):
    sampling, limits = Sampling(temperature=1.0, top_p=0.9, seed=5), replace(TEN, samples=2)
    with one_process():
        rows = answers(paths["rotary"], sampling, limits)
        again = answers(paths["rotary"], sampling, limits, prompts=PROMPTS[:1])
        other = answers(paths["rotary"], replace(sampling, seed=6), limits)
    expected = [row.new_tokens for row in rows]
    assert [row.new_tokens for row in again] == expected[:2]
    assert [row.new_tokens for row in other] != expected and expected[0] != expected[1]
    for found in run_ranks(2, lambda: [row.new_tokens for row in answers(paths["rotary"], sampling, limits, tp=2)]):
        assert found == expected


def test_log_probabilities_are_those_of_the_whole_row(paths):
    with one_process():
        (row,) = answers(paths["rotary"], Sampling(temperature=2.0), replace(TEN, logprobs=True), prompts=["def"])
    model = MODELS["rotary"]
    with torch.no_grad():
        logprobs = built(model, draw(model)).eval()(torch.tensor([row.tokens]))[0].log_softmax(-1)
    expected = [logprobs[row.prompt_length - 1 + n, token].item() for n, token in enumerate(row.new_tokens)]
    assert row.logprobs == pytest.approx(expected, abs=1e-5)
    for (found,) in run_ranks(
        4, answers, paths["rotary"], Sampling(temperature=2.0), replace(TEN, logprobs=True), 2, 2, True, ["def"]
    ):
        assert found.tokens == row.tokens and found.logprobs == pytest.approx(expected, abs=1e-5)


def test_an_answer_ends_at_its_limit_a_stop_string_the_context_or_the_end_of_the_document(paths):
    with one_process():
        generator = Generator(runner(paths["rotary"]), byte_tokenizer())
        (plain,) = generator(["def"], GREEDY, Limits(max_new_tokens=8, ignore_end=True))
        assert plain.finish == "length" and len(plain.new_tokens) == 8
        (long,) = generator(["def"], GREEDY, Limits(max_new_tokens=500, ignore_end=True))
        assert long.finish == "context" and len(long.tokens) == 32
        stop = bytes(plain.new_tokens[3:5]).decode("latin-1")
        text = generator.tokenizer.decode(plain.new_tokens)
        stop = text[3:5]
        (stopped,) = generator(["def"], GREEDY, Limits(max_new_tokens=8, stops=["never", stop], ignore_end=True))
        assert stopped.finish == "stop" and stopped.text == text[: text.index(stop)]
        generator.tokenizer.eod_id = plain.new_tokens[4]
        (ended,) = generator(["def"], GREEDY, Limits(max_new_tokens=8))
        first = plain.new_tokens.index(plain.new_tokens[4])
        assert ended.finish == "end" and ended.new_tokens == plain.new_tokens[:first]


def test_ids_without_a_text_are_never_drawn(tmp_path):
    model = replace(MODELS["rotary"], vocab_size=300)  # the byte tokenizer has 257
    path = checkpoint(tmp_path / "padded", model, tokenizer="byte")
    with one_process():
        hot = Sampling(temperature=50.0, repetition_penalty=1.5)
        rows = answers(path, hot, Limits(max_new_tokens=30, samples=8, ignore_end=True), prompts=["a"])
    assert max(max(row.new_tokens) for row in rows) in range(200, 257)


def test_rows_that_end_early_leave_the_others_alone(paths):
    with one_process():
        generator = Generator(runner(paths["rotary"]), byte_tokenizer())
        rows = generator(PROMPTS, GREEDY, Limits(max_new_tokens=20, ignore_end=True))
        stop = rows[0].text[2]
        stopped = generator(PROMPTS, GREEDY, Limits(max_new_tokens=20, stops=[stop], ignore_end=True))
    for row, short in zip(rows, stopped):
        assert short.text == row.text.split(stop)[0]


def test_the_stream_adds_up_to_the_text_and_takes_nothing_back(paths):
    pieces: dict[int, str] = {}

    def note(row, piece):
        pieces[row.prompt] = pieces.get(row.prompt, "") + piece

    with one_process():
        generator = Generator(runner(paths["rotary"]), byte_tokenizer())
        rows = generator(PROMPTS, GREEDY, Limits(max_new_tokens=20, stops=["xyz"], ignore_end=True), note)
    assert [pieces.get(row.prompt, "") for row in rows] == [row.text for row in rows]


def test_prompts_and_settings_that_cannot_work_are_refused(paths):
    with one_process():
        generator = Generator(runner(paths["rotary"]), byte_tokenizer())
        with pytest.raises(UserError, match=r"has 32 tokens.*model.seq_length = 32"):
            generator(["x" * 32])
    for settings in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"repetition_penalty": 0.0}):
        (name,) = settings
        with pytest.raises(UserError, match=f"{name} = "):
            Sampling(**settings)
    with pytest.raises(UserError, match="max_new_tokens = 0 must be"):
        Limits(max_new_tokens=0)


def test_meshes_that_cannot_hold_the_model_are_refused(paths):
    def refusal(pp: int, tp: int) -> str:
        found = "fine"
        try:
            runner(paths["rotary"], pp, tp)
        except UserError as error:
            found = str(error)
        dist.barrier()  # a rank that leaves early may cut off what another still reads
        return found

    for pp, tp, sentence in ((1, 1, "pp(1) * tp(1) = 1 ranks"), (4, 1, "num_layers = 3 cannot fill pp(4)")):
        for found in run_ranks(4, refusal, pp, tp):
            assert sentence in found
    assert "parallel.tp = 3 does not divide model.num_heads = 4" in run_ranks(3, refusal, 1, 3)[0]
