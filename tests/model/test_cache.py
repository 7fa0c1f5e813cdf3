"""With a cache, every token of every row gets the logits that the whole row would give it."""

from __future__ import annotations

import pytest
import torch

from neox_native.model.cache import Cache
from neox_native.model.transformer import Transformer
from tests.model.test_transformer import TOKENS, VARIANTS, build

CPU = torch.device("cpu")


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_steps_with_a_cache_equal_one_pass(settings):
    model, cache = build(**settings), Cache(16, CPU)
    expected = model(TOKENS)
    pieces = []
    for start, count in ((0, 5), (5, 1), (6, 4), (10, 1), (11, 5)):
        cache.place([start, start], count)
        pieces.append(model(TOKENS[:, start : start + count], cache=cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pos_emb", ["rotary", "learned", "sinusoidal", "alibi", "none"])
def test_rows_of_different_lengths_do_not_see_each_others_padding(pos_emb):
    model, cache = build(pos_emb=pos_emb), Cache(16, CPU)
    expected = model(TOKENS)
    lengths = [3, 8]
    cache.place([0, 0], 8)
    prompts = TOKENS[:, :8].clone()
    prompts[0, 3:] = 49
    last = model(prompts, cache=cache, readout_B=torch.tensor([2, 7]))
    for step in range(6):
        for row, length in enumerate(lengths):
            torch.testing.assert_close(last[row, 0], expected[row, length - 1 + step], rtol=0, atol=1e-5)
        starts = [length + step for length in lengths]
        cache.place(starts, 1)
        last = model(TOKENS[[0, 1], starts][:, None], cache=cache)


def test_parts_with_a_cache_of_their_own_equal_the_whole():
    whole = build(pos_emb="alibi")
    state, config = whole.state_dict(), whole.config
    parts = [Transformer(config, range(2), last=False), Transformer(config, [2], first=False)]
    for part in parts:
        part.load_state_dict({name: state[name] for name in part.state_dict()})
    caches = [Cache(16, CPU), Cache(16, CPU)]
    for start, count in ((0, 7), (7, 1), (8, 2)):
        x = TOKENS[:, start : start + count]
        for part, cache in zip(parts, caches):
            cache.place([start, start], count)
            x = part(x, cache=cache)
        torch.testing.assert_close(x, whole(TOKENS)[:, start : start + count], rtol=0, atol=1e-5)
