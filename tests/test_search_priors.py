"""Edit priors: the formula, what a model's blocks get, and refusals."""

import pytest
import torch
from families import LAYERS, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from drllm_fast.influence import CRITERIA, StaticPolicy, influences
from drllm_fast.search.priors import block_weights, edit_prior
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
