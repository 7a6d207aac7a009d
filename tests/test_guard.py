"""The guard: distances by hand, k-means that finds what is there, and prompts that run every block once."""

import math

import pytest
import torch
from families import prompts, tiny
from hypothesis import given
from hypothesis import strategies as st

from drllm_fast.guard import Guard, row_means
from drllm_fast.paths import route_paths
from drllm_fast.policies import PromptBatch
from drllm_fast.routers import LayerRouters


def around(directions, each, spread, seed=0):
    """Points near some directions, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor(directions, dtype=torch.float32).repeat_interleave(each, 0)
    return 5 + centres + spread * torch.randn(centres.shape, generator=generator)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


# -- the rule
def test_distances_by_hand():
    guard = Guard(torch.tensor([[2.0, 0, 0], [0, 0.5, 0]]), torch.tensor([1.0, 1, 1]), 0.3)
    means = torch.tensor([[3.0, 1, 1], [1, 9, 1], [2, 2, 1], [1, 1, 4], [-4, 1, 1], [2, 1.2, 1]])
    expected = [
        1 - max(cosine(p, q) for q in ([2.0, 0, 0], [0, 0.5, 0]))
        for p in ((means - 1).tolist())
    ]  # fmt: skip
    torch.testing.assert_close(guard.distances(means), torch.tensor(expected))
    assert guard.unlike(means).tolist() == [False, False, False, True, True, False]  # 1 - cos 45 degrees is 0.293
    assert guard.distances(means.double()).dtype == torch.float32
    assert guard.unlike(means[:0]).tolist() == []


@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.sampled_from([torch.float32, torch.bfloat16]))
def test_means_of_rows(lengths, dtype):
    generator = torch.Generator().manual_seed(sum(lengths))
    hidden = torch.randn(sum(lengths), 5, generator=generator).to(dtype)
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    found = row_means(hidden, torch.tensor(ends, dtype=torch.int32))
    assert found.dtype == torch.float32 and found.shape == (len(lengths), 5)
    for row, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
        by_hand = [sum(column) / (b - a) for column in zip(*hidden[a:b].tolist(), strict=True)] if b > a else [0.0] * 5
        assert found[row].tolist() == pytest.approx(by_hand, abs=1e-5)


def test_means_do_not_follow_defaults_of_torch():
    torch.set_default_dtype(torch.float64)
    try:
        means = row_means(torch.ones(3, 2, dtype=torch.float32), torch.tensor([0, 1, 3], dtype=torch.int32))
        guard = Guard.fit(around([[3, 0], [0, 3]], 5, 0.1).float(), prototypes=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert means.dtype == guard.prototypes.dtype == torch.float32 and means.tolist() == [[1, 1], [1, 1]]


# -- the fit
def test_the_fit_finds_the_kinds_there_are():
    kinds = [[4.0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 0, 4]]
    means = around(kinds, 20, 0.2)
    guard = Guard.fit(means, prototypes=4)
    torch.testing.assert_close(guard.centre, means.mean(0))
    groups = (means - guard.centre).view(4, 20, 4).mean(1)
    best = [max(cosine(kind, found) for found in guard.prototypes.tolist()) for kind in groups.tolist()]
    assert min(best) > 0.999 and guard.prototypes.norm(dim=1).tolist() == pytest.approx([1] * 4)
    other = around([[2.0, 2, 0, 0], [-4, 0, 0, 0]], 10, 0.2, seed=1)
    assert guard.unlike(other).all() and not guard.unlike(around(kinds, 20, 0.05, seed=2)).any()


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99, 1.0])
def test_the_quantile_is_the_share_that_passes(quantile):
    means = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    guard = Guard.fit(means, prototypes=8, quantile=quantile)
    assert guard.unlike(means).double().mean().item() == pytest.approx(1 - quantile, abs=0.003)
    assert 0 < guard.radius < 2


def test_the_same_seed_gives_the_same_guard():
    means = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    one, two, other = (Guard.fit(means, prototypes=5, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.prototypes, two.prototypes) and one.radius == two.radius
    assert not torch.equal(one.prototypes, other.prototypes) and torch.equal(before, torch.get_rng_state())


def test_few_prompts():
    alone = Guard.fit(torch.ones(1, 4))
    assert not alone.unlike(torch.tensor([[1.0, 1, 1, 1], [0, 5, 0, 0]])).any()  # nothing is known of its kind
    twice = Guard.fit(torch.tensor([[1.0, 0], [0, 1]]).repeat(9, 1), prototypes=32)
    assert len(twice.prototypes) == 2 and twice.radius == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"means": torch.zeros(0, 4)}, r"at least one prompt, got \[0, 4\]"),
        ({"means": torch.zeros(4)}, r"got \[4\]"),
        ({"means": torch.full((3, 4), math.nan)}, "means must be finite"),
        ({"quantile": 0}, "quantile must be in"),
        ({"quantile": 1.1}, "quantile must be in"),
        ({"quantile": math.nan}, "quantile must be in"),
        ({"prototypes": 0}, "prototypes at least 1"),
    ],
)
def test_fits_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Guard.fit(**({"means": torch.randn(5, 4)} | arguments))


@pytest.mark.parametrize(
    "prototypes, centre, radius",
    [((0, 4), 4, 0.5), ((4,), 4, 0.5), ((2, 4), 3, 0.5), ((2, 4), 4, math.nan), ((2, 4), 4, -0.1), ((2, 4), 4, 2.1)],
)
def test_guards_that_are_none(prototypes, centre, radius):
    with pytest.raises(ValueError, match="a guard"):
        Guard(torch.ones(prototypes), torch.ones(centre), radius)


# -- in the routers
def skipping(model, guard):
    routers = LayerRouters.for_model(model, router_size=8)
    routers.guard, routers.penalty = guard, 1000.0
    return routers


def test_unlike_prompts_run_every_block_once(model):
    texts = [p.tolist() for p in prompts([9, 3, 17, 12, 5, 20])]
    inputs = model.get_input_embeddings().weight.detach()
    means = torch.stack([inputs[text].mean(0) for text in texts])
    guard = Guard(torch.nn.functional.normalize(means[[0, 2, 4]], dim=1), torch.zeros(32), 0.2)
    expected = [max(cosine(mean, known) for known in means[[0, 2, 4]].tolist()) < 0.8 for mean in means.tolist()]
    assert expected == [False, True, False, True, False, True]
    routers = skipping(model, guard)
    for max_tokens in (10, 1000):
        plans = route_paths(model, texts, routers, max_tokens=max_tokens)
        assert plans.tolist() == [[int(unlike)] * 4 for unlike in expected]
    routers.penalty = -1000.0
    assert route_paths(model, texts, routers).tolist() == [[1 if unlike else 2] * 4 for unlike in expected]
    routers.guard = None
    assert route_paths(model, texts, routers).tolist() == [[2] * 4] * 6


def test_the_guard_reads_the_prompt_not_the_answer(model):
    text, answer = (p.tolist() for p in prompts([9, 30], seed=4))
    embedded = model.get_input_embeddings().weight.detach()[text].mean(0, keepdim=True)
    guard = Guard(torch.nn.functional.normalize(embedded, dim=1), torch.zeros(32), 1e-4)
    model.enable_dynamic_routing(skipping(model, guard))
    with torch.no_grad():
        with model.routing.context([9]):
            model(torch.tensor([text + answer]))
        assert model.routing.plan.tolist() == [[0] * 4]
        model(torch.tensor([text + answer]))
        assert model.routing.plan.tolist() == [[1] * 4]


def test_means_enter_block_0_as_the_family_scales_them():
    """Gemma multiplies its embeddings: cosines do not change, but the centre must be of the same scale."""
    model = tiny("gemma3_text")
    text = prompts([9])[0].tolist()
    weight = model.get_input_embeddings().weight.detach()
    entering = weight[text].mean(0) * 32**0.5
    guard = Guard(torch.ones(1, 32), entering - 1, 1e-4)  # the difference points along the prototype
    assert route_paths(model, [text], skipping(model, guard)).tolist() == [[0] * 4]


def test_layer_0_is_asked_first():
    routers = LayerRouters(
        num_layers=3, hidden_size=4, router_size=8, guard=Guard(torch.ones(1, 4), torch.zeros(4), 0.1)
    )
    lengths = torch.tensor([0, 3, 5], dtype=torch.int32)
    states = torch.ones(5, 4)
    states[3:] = torch.tensor([1.0, -1, 1, -1])
    fresh = PromptBatch(states, lengths)
    with pytest.raises(ValueError, match="layer 1 was asked before layer 0"):
        routers.route(1, fresh)
    routers.penalty = 1000.0
    assert routers.route(0, fresh).tolist() == [0, 1]
    later = PromptBatch(torch.randn(5, 4), lengths, memory=fresh.memory)
    assert routers.route(2, later).tolist() == [0, 1]  # as layer 0 saw them
