from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from neox_native.config.schema import Model, Run
from neox_native.model import initialize, positions
from neox_native.model.parameters import Card, normal
from neox_native.model.transformer import Transformer, cards

SMALL = Model(num_layers=3, hidden_size=32, num_heads=4, seq_length=16, vocab_size=50, vocab_multiple_of=16)
TOKENS = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))

VARIANTS = {
    "default": {},
    "sequential": dict(parallel_residual=False),
    "learned": dict(pos_emb="learned"),
    "sinusoidal": dict(pos_emb="sinusoidal"),
    "alibi": dict(pos_emb="alibi"),
    "no positions": dict(pos_emb="none"),
    "rmsnorm": dict(norm="rmsnorm"),
    "tanh gelu": dict(activation="gelu_tanh"),
    "swiglu": dict(activation="swiglu", ffn_hidden_size=48),
    "geglu": dict(activation="geglu"),
    "grouped queries": dict(num_kv_heads=2),
    "one key head": dict(num_kv_heads=1),
    "tied": dict(tie_embeddings=True),
    "no biases": dict(attention_bias=False, mlp_bias=False),
}


def build(**settings) -> Transformer:
    config = replace(SMALL, **settings)
    model = Transformer(config, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_causality(settings):
    model = build(**settings)
    changed = TOKENS.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 50
    before, after = model(TOKENS), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_parameter_gets_a_gradient(settings):
    model = build(**settings)
    model(TOKENS).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("pos_emb", ["rotary", "learned", "sinusoidal", "alibi"])
def test_positions_matter(pos_emb):
    model = build(pos_emb=pos_emb)
    same_tokens = torch.full((1, 16), 7)
    swapped = torch.tensor([[3, 9] + [7] * 14]), torch.tensor([[9, 3] + [7] * 14])
    assert not torch.allclose(model(swapped[0])[:, -1], model(swapped[1])[:, -1], atol=1e-6)
    assert model(same_tokens).isfinite().all()


def test_without_positions_order_before_the_query_does_not_matter():
    model = build(pos_emb="none", num_layers=1)
    first, second = torch.tensor([[3, 9, 7, 7]]), torch.tensor([[9, 3, 7, 7]])
    torch.testing.assert_close(model(first)[:, -1], model(second)[:, -1])


@pytest.mark.parametrize("pos_emb", ["rotary", "learned", "sinusoidal", "alibi", "none"])
def test_a_packed_document_with_masks_and_its_own_positions_equals_the_document_alone(pos_emb):
    model = build(pos_emb=pos_emb)
    alone = model(TOKENS[:, 6:])
    documents = torch.tensor([[0] * 6 + [1] * 10]).expand(2, -1)
    restarted = torch.cat((torch.arange(6), torch.arange(10))).expand(2, -1)
    packed = model(TOKENS, positions_BT=restarted, documents_BT=documents)
    torch.testing.assert_close(packed[:, 6:], alone)


DOCUMENTS = torch.tensor([[0] * 6 + [1] * 10, [0] * 3 + [1] * 4 + [2] * 9])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_attention_sees_the_documents_that_a_mask_shows(kv_heads, monkeypatch):
    model = build(num_kv_heads=kv_heads)
    masked = model(TOKENS, documents_BT=DOCUMENTS)
    monkeypatch.setattr(Transformer, "attends_in_blocks", lambda *_: True)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # CPUs have no backward pass for it
        torch.testing.assert_close(model(TOKENS, documents_BT=DOCUMENTS), masked)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward pass needs a GPU")
def test_gradients_through_flex_attention_equal_those_through_a_mask(monkeypatch):
    gradients = []
    for blocks in (True, False):
        monkeypatch.setattr(Transformer, "attends_in_blocks", lambda *_, blocks=blocks: blocks)
        model = build().cuda()
        model(TOKENS.cuda(), documents_BT=DOCUMENTS.cuda()).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_parts_one_after_the_other_equal_the_whole():
    whole = build()
    config, state = whole.config, whole.state_dict()
    parts = [Transformer(config, range(2), last=False), Transformer(config, [2], first=False)]
    names = [name for part in parts for name, _ in part.named_parameters()]
    assert sorted(names) == sorted(state)
    for part in parts:
        part.load_state_dict({name: state[name] for name in part.state_dict()})
    assert torch.equal(parts[1](parts[0](TOKENS)), whole(TOKENS))


def test_grouped_queries_equal_full_attention_with_repeated_keys():
    grouped, full = build(num_kv_heads=2), build()
    state = grouped.state_dict()
    for name, tensor in state.items():
        if "query_key_value" in name:
            heads = tensor.unflatten(0, (2, 4, 8))  # [kv head, (two queries, key, value), head dim, ...]
            pairs = [torch.stack((heads[k, q], heads[k, 2], heads[k, 3])) for k in range(2) for q in range(2)]
            state[name] = torch.stack(pairs).flatten(0, 2)
    full.load_state_dict(state)
    torch.testing.assert_close(full(TOKENS), grouped(TOKENS))


def test_tied_head_is_the_embedding():
    model = build(tie_embeddings=True)
    assert model.readout.embed_out.weight is model.embed_in.weight
    assert "readout.embed_out.weight" not in dict(model.named_parameters())
    assert model.global_name("readout.embed_out.weight") == "embed_in.weight"


def test_dropout_acts_in_training_only():
    model = build(hidden_dropout=0.5, attention_dropout=0.5)
    assert not torch.allclose(model(TOKENS), model(TOKENS))
    model.eval()
    assert torch.equal(model(TOKENS), model(TOKENS))


def test_alibi_slopes_of_a_head_count_that_is_no_power_of_two():
    expected = [2 ** (-8 * (i + 1) / 4) for i in range(4)] + [2 ** (-8 * (i + 1) / 8) for i in (0, 2)]
    assert positions.alibi_slopes(6, torch.device("cpu")).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_used_as_a_library_starts_as_a_run_does(tied):
    config = replace(SMALL, tie_embeddings=tied, init="normal", init_std=0.3)
    for model in (Transformer(config), Transformer(config, range(1, 2), first=False)):
        for name, parameter in model.named_parameters():
            name = model.global_name(name)
            assert torch.equal(parameter, initialize.draw(name, cards(config)[name], Run().seed)), name


def test_initial_weights_depend_on_seed_and_name_alone():
    draw = lambda name, seed: initialize.draw(name, Card((8, 8), normal(1.0)), seed)  # noqa: E731
    assert torch.equal(draw("a.weight", 1), draw("a.weight", 1))
    assert not torch.equal(draw("a.weight", 1), draw("b.weight", 1))
    assert not torch.equal(draw("a.weight", 1), draw("a.weight", 2))


@pytest.mark.parametrize(
    "method, expected",
    [("small_init", (2 / (5 * 32)) ** 0.5), ("wang_init", 2 / (3 * 32**0.5)), ("normal", 0.02), ("scaled_normal", 0.02 / 6**0.5)],
)
def test_initial_weights_have_the_methods_spread(method, expected):
    config = replace(SMALL, init=method, vocab_size=4000)
    assert initialize.draw("embed_in.weight", cards(config)["embed_in.weight"], 0).std().item() == pytest.approx(expected, rel=0.02)
