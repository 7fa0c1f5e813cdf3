from __future__ import annotations

import torch

from neox_native.data.tokenizers import byte_tokenizer
from neox_native.inference.sampling import Sampling, choose, draw, keep_top_k, keep_top_p, penalise_repetition
from neox_native.inference.text import GrowingText

PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]])
LOGITS = PROBABILITIES.log()


def kept(logits):
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_top_k_keeps_the_k_most_probable():
    assert kept(keep_top_k(LOGITS, 2)[:1]) == [[1, 3]]
    assert torch.equal(keep_top_k(LOGITS, 9), LOGITS)


def test_top_p_keeps_the_fewest_that_reach_p():
    assert kept(keep_top_p(LOGITS, 0.69)) == [[1, 3], [0]]
    assert kept(keep_top_p(LOGITS, 0.71)) == [[1, 2, 3], [0]]
    assert kept(keep_top_p(LOGITS, 1e-9)) == [[1], [0]]


def test_draws_follow_the_probabilities():
    uniform = (torch.arange(1000) + 0.5) / 1000
    tokens = draw(LOGITS[:1].expand(1000, -1), uniform)
    assert (tokens.bincount(minlength=4) / 1000 - PROBABILITIES[0]).abs().max() < 2e-3
    assert draw(keep_top_k(LOGITS, 1), torch.tensor([0.0, 0.999999])).tolist() == [1, 0]


def test_a_number_close_to_one_draws_no_token_of_probability_zero():
    logits = torch.tensor([[0.0, 0.0, float("-inf")]])
    assert draw(logits, torch.tensor([1 - 2**-24])).tolist() == [1]


def test_repetition_is_penalised_whatever_the_sign():
    logits, seen = torch.tensor([[2.0, -2.0, 2.0]]), torch.tensor([[True, True, False]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0]]
    assert choose(logits, Sampling(repetition_penalty=2.0), seen, None).tolist() == [2]


def test_low_temperature_approaches_greedy():
    uniform = torch.full((2,), 0.5)
    assert choose(LOGITS, Sampling(temperature=1e-4), None, uniform).tolist() == [1, 0]
    assert choose(LOGITS, Sampling(), None, None).tolist() == [1, 0]


def test_a_stream_waits_for_whole_characters_and_possible_stop_strings():
    growing, tokens, seen = GrowingText(byte_tokenizer(), ["STOP"]), [], []
    for byte in "é SToST then STOP and".encode():
        tokens.append(byte)
        growing.update(tokens)
        seen.append(growing.news(finished=False))
        if growing.stopped:
            break
    assert seen[:2] == ["", "é"] and "".join(seen) == growing.text == "é SToST then "
    assert all("\ufffd" not in piece for piece in seen)
