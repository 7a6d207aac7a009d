"""Edit priors: the formula, what a model's blocks get, and refusals."""

import pytest
import torch
from characters import Characters
from families import LAYERS, tiny
from hypothesis import given
from hypothesis import strategies as st
from oracles import edited
from torch import nn

from drllm_fast.influence import CRITERIA, StaticPolicy, influences
from drllm_fast.search.priors import block_weights, edit_divergences, edit_prior
from drllm_fast.search.searcher import Outcome, make_searcher
from drllm_fast.search.unit import SearchConfig

TEXTS = ["the first prompt", "a second and somewhat longer prompt of the calibration text"]


def tokenizer(text):
    """One id of the tiny models' 97 for each character."""
    return {"input_ids": [1 + ord(c) % 96 for c in text]}


def test_the_formula():
    assert block_weights([1.0, 3.0, 0.0, 1.0, 0.5]) == [1.0, 0.5, 2.0, 1.0, pytest.approx(4 / 3)]
    assert block_weights([0.0, 0.0, 5.0]) == [1.0, 1.0, 0.0]
    assert block_weights([-1e-12, 1.0, 2.0])[0] == 2.0


@given(st.lists(st.floats(0, 2), min_size=1, max_size=40))
def test_less_influence_more_weight(scores):
    weights = block_weights(scores)
    assert all(0 <= weight <= 2 for weight in weights)
    for score, weight in zip(scores, weights, strict=True):
        assert all(weight >= w for s, w in zip(scores, weights, strict=True) if s > score)


@pytest.mark.parametrize("kind", CRITERIA)
def test_of_a_model(model, kind):
    """A block that adds nothing has the largest weight, and is the first that calibration removes."""
    idle = model.model.layers[1]
    nn.init.zeros_(idle.self_attn.o_proj.weight)
    nn.init.zeros_(idle.mlp.down_proj.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = influences(model, tokenizer, TEXTS, criterion=kind)
    prior = edit_prior(model, tokenizer, kind, texts=TEXTS)
    assert prior == [(w, w) for w in block_weights(scores)]
    assert len(prior) == LAYERS and max(prior) == prior[1]
    policy = StaticPolicy.calibrate(model, tokenizer, TEXTS, budget=0.75, criterion=kind, progress=False)
    assert policy.order[0] == 1 == scores.index(min(scores))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    search = make_searcher(SearchConfig(prior=kind), LAYERS, Outcome(0.0, False), 0, prior)
    assert search.ask(1)


@torch.no_grad()
def divergence(model, path, text):
    """KL(dense || path) a token of the second half of a text, by hand."""
    words = text.split()
    before = Characters().encode(" ".join(words[: len(words) // 2]))
    after = Characters().encode(" " + " ".join(words[len(words) // 2 :]))
    ids = torch.tensor([before + after])
    dense, other = (m(input_ids=ids, use_cache=False).logits[0].double() for m in (model, edited(model, path)))
    log_p, log_q = dense.log_softmax(-1), other.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)[len(before) - 1 : -1].mean().item()


def test_kl_measures_each_edit(model):
    texts = [*TEXTS, "a third one"]
    skip, repeat = edit_divergences(model, Characters(), texts)
    for times, found in ((0, skip), (2, repeat)):
        for block in range(LAYERS):
            path = [times if layer == block else 1 for layer in range(LAYERS)]
            expected = sum(divergence(model, path, text) for text in texts) / len(texts)
            assert found[block] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert edit_prior(model, Characters(), "kl", texts=texts) == list(
        zip(block_weights(skip), block_weights(repeat), strict=True)
    )
    cut, _ = edit_divergences(model, Characters(), [TEXTS[1]], max_tokens=6)
    assert cut == pytest.approx(edit_divergences(model, Characters(), [" ".join(TEXTS[1].split()[:6])])[0])
    assert cut != pytest.approx(edit_divergences(model, Characters(), TEXTS[1:])[0], rel=0.01)


def test_kl_tells_skips_from_repeats(model):
    """A block that adds nothing may be skipped and repeated at will; one that adds its share at once only skipped."""
    idle = model.model.layers[1]
    nn.init.zeros_(idle.self_attn.o_proj.weight)
    nn.init.zeros_(idle.mlp.down_proj.weight)
    weights = edit_prior(model, Characters(), "kl", texts=TEXTS)
    assert weights[1] == pytest.approx((2.0, 2.0), abs=1e-4)
    assert max(skip for skip, _ in weights[2:] + weights[:1]) < 1.99
    assert any(abs(skip - repeat) > 0.05 for skip, repeat in weights)
    assert not hasattr(model.get_decoder(), "_drllm_routing")
    search = make_searcher(SearchConfig(method="spread", prior="kl"), LAYERS, Outcome(0.0, False), 0, weights)
    assert search.ask(3)


def test_none_needs_no_model():
    assert edit_prior(None, None, "none") is None


def test_refusals():
    model = tiny("llama")
    with pytest.raises(ValueError, match="prior must be one of none, block-influence, cka, kl, got 'shapley'"):
        edit_prior(model, tokenizer, "shapley")
    with pytest.raises(ValueError, match="criterion must be one of block-influence, cka, got 'shapley'"):
        influences(model, tokenizer, criterion="shapley")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="block 0 are not finite"):
        edit_prior(model, tokenizer, "cka", texts=TEXTS)
