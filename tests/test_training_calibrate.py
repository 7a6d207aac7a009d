"""Calibration: budgets that are kept on prompts it has not seen, and what it says where they cannot be."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from families import LAYERS, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import edited

from drllm_fast.budget import BudgetTable
from drllm_fast.guard import Guard
from drllm_fast.paths import route_paths
from drllm_fast.router_reference import pool_windows
from drllm_fast.routers import LayerRouters
from drllm_fast.training import calibrate as module
from drllm_fast.training.calibrate import BUDGETS, calibrate, fit_guard, prompt_means

DEEP = 12


def mixture(count, seed):
    """Prompts of three kinds, and their kinds: each draws its tokens from a part of the vocabulary of its own."""
    generator = torch.Generator().manual_seed(seed)
    texts, kinds = [], []
    for number in range(count):
        length = int(torch.randint(3, 16, (1,), generator=generator))
        texts.append((2 + 30 * (number % 3) + torch.randint(0, 30, (length,), generator=generator)).tolist())
        kinds.append("abc"[number % 3])
    return texts, kinds


def untrained(model, seed=0, scale=1.0):
    routers = LayerRouters.for_model(model, router_size=16, windows=4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        routers.w1.mul_(scale)
    return routers


@pytest.fixture(scope="module")
def deep():
    """Of blocks that change the stream a little, as those of trained models do."""
    model = tiny("llama", num_hidden_layers=DEEP)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(0.3)
            block.mlp.down_proj.weight.mul_(0.3)
    return model


@torch.no_grad()
def paths_by_hand(model, routers, texts, penalty, margin=0.0):
    """The path of each prompt, from Hugging Face's own model: block by block, from the stack edited to the decisions
    so far."""
    found = []
    for text in texts:
        path = []
        for layer in range(len(model.model.layers)):
            alone, entering = edited(model, [*path, 1] + [0] * (len(model.model.layers) - layer - 1)), []
            alone.model.layers[-1].register_forward_pre_hook(
                lambda block, args, kwargs, seen=entering: seen.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
            alone.model(input_ids=torch.tensor([text]), use_cache=False)
            pooled, counts = pool_windows(entering[0][0], torch.tensor([0, len(text)]), routers.windows)
            inner = torch.nn.functional.gelu(
                pooled[0, : counts[0]] @ routers.w1[layer].T + routers.b1[layer], approximate="tanh"
            )
            skip, execute, repeat = ((inner @ routers.w2[layer].T + routers.b2[layer]).mean(0)).tolist()
            scores = [skip - margin, execute - penalty, repeat - margin - 2 * penalty]
            path.append(scores.index(max(scores)))
        found.append(path)
    return torch.tensor(found)


# -- budgets are kept
@pytest.mark.parametrize("seed, margin, guarded", [(0, 0.0, False), (1, 0.05, True)])
def test_budgets_are_kept_on_unseen_prompts(deep, seed, margin, guarded):
    texts, kinds = mixture(1500, seed=1)
    unseen, _ = mixture(1500, seed=2)
    routers = untrained(deep, seed, scale=4.0)
    with torch.no_grad():
        routers.b2.normal_(0, 3, generator=torch.Generator().manual_seed(seed))  # blocks that differ
    routers.margin = margin
    if guarded:
        routers.guard = fit_guard(deep, texts, prototypes=8, quantile=0.9)
    table = calibrate(deep, routers, texts, groups=kinds, progress=False)
    assert table.budgets == BUDGETS and table.source["left_out"] == []
    assert all(abs(kept - budget) <= 0.005 for kept, budget in zip(table.source["kept"], BUDGETS, strict=True))
    assert table.source["guarded"] == pytest.approx(0.1 if guarded else 0, abs=0.002)
    assert table.source["measurements"] <= 3 * len(BUDGETS)
    routers.calibration = table
    for budget in (*BUDGETS, 0.525, 0.8763, 1.07):
        routers.budget = budget
        plans = route_paths(deep, unseen, routers)
        assert plans.double().mean().item() == pytest.approx(budget, abs=0.02)
        assert len(plans.unique(dim=0)) > 1  # prompts differ


def test_what_is_written_down_is_what_a_single_prompt_runs():
    model, (texts, kinds) = tiny("llama"), mixture(24, seed=3)
    routers = untrained(model, scale=4.0)
    routers.margin = 0.02
    before = {name: tensor.clone() for name, tensor in [*routers.state_dict().items(), *model.state_dict().items()]}
    routers.calibration = BudgetTable((0.3, 1.9), (5.0, -5.0))
    routers.penalty = 0.7
    routers.budget = 0.4
    table = calibrate(
        model, routers, texts, budgets=[1.1, 0.6, 0.9], tolerance=0.03, groups=kinds, max_tokens=70, progress=False
    )
    assert table.budgets == (0.6, 0.9, 1.1)
    for place, penalty in enumerate(table.penalties):
        shares = paths_by_hand(model, routers, texts, penalty, margin=0.02).double().mean(1)
        assert table.source["kept"][place] == pytest.approx(shares.mean().item())
        for kind in "abc":
            of_kind = shares[[i for i, k in enumerate(kinds) if k == kind]].mean().item()
            assert table.source["groups"][kind]["kept"][place] == pytest.approx(of_kind)
    assert {name: group["prompts"] for name, group in table.source["groups"].items()} == {"a": 8, "b": 8, "c": 8}
    assert (table.source["prompts"], table.source["margin"], table.source["tolerance"]) == (24, 0.02, 0.03)
    assert BudgetTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table

    # The routers and the model are left as they were.
    assert (routers.budget, routers.calibration.budgets, routers.margin) == (0.4, (0.3, 1.9), 0.02)
    routers.budget = None
    assert routers.penalty == 0.7 and not hasattr(model.get_decoder(), "_drllm_routing")
    after = dict([*routers.state_dict().items(), *model.state_dict().items()])
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_routed_model_is_calibrated_as_if_it_were_not(deep):
    texts, _ = mixture(60, seed=4)
    routers, model = untrained(deep, 1), copy.deepcopy(deep)
    plain = calibrate(deep, routers, texts, budgets=[0.7, 1.0], progress=False)
    model.enable_dynamic_routing([0] * DEEP).train()
    policy = model.routing.policy
    with model.routing.using([2] * DEEP), model.routing.context([1] * 60):
        again = calibrate(model, routers, texts, budgets=[0.7, 1.0], progress=False)
    assert again == plain and model.routing.policy is policy and model.training


@given(
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 0.3, 3.0]),
    budgets=st.lists(st.floats(0.02, 1.98), min_size=1, max_size=6),
    tolerance=st.sampled_from([0.002, 0.02, 0.1]),
    margin=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=30, deadline=None)
def test_what_holds_for_every_table(seed, scale, budgets, tolerance, margin):
    """Also for routers that change all prompts at once (scale 0), budgets side by side, and shares that rise."""
    model, (texts, _) = TINY, mixture(20, seed)
    routers = untrained(model, seed, scale)
    with torch.no_grad():
        routers.b2.normal_(generator=torch.Generator().manual_seed(seed))
    routers.margin = margin
    try:
        table = calibrate(model, routers, texts, budgets=budgets, tolerance=tolerance, progress=False)
    except ValueError as error:
        assert "can be kept to" in str(error)
        return
    assert set(table.budgets) | set(table.source["left_out"]) == set(budgets)
    assert not set(table.budgets) & set(table.source["left_out"])
    assert list(table.budgets) == sorted(table.budgets)
    assert list(table.penalties) == sorted(table.penalties, reverse=True)
    for budget, penalty, kept in zip(table.budgets, table.penalties, table.source["kept"], strict=True):
        routers.penalty = penalty
        assert route_paths(model, texts, routers).double().mean().item() == kept
        assert abs(kept - budget) <= tolerance


TINY = tiny("llama")


# -- budgets that cannot be kept
def test_where_the_share_jumps():
    """Routers that do not read: every prompt takes the same path, and shares are quarters."""
    model, (texts, _) = TINY, mixture(9, seed=5)
    routers = untrained(model, scale=0.0)
    with torch.no_grad():
        routers.b2.copy_(torch.tensor([[0.0, 1, -8], [0, 2, -8], [0, 3, -8], [0, 4, -8]]))
    table = calibrate(model, routers, texts, budgets=[0.3, 0.5, 0.6, 0.75, 1], tolerance=0.01, progress=False)
    assert table.budgets == (0.5, 0.75, 1.0) and table.source["left_out"] == [0.3, 0.6]
    for (low, high), penalty in zip([(2, 3), (1, 2), (-9, 1)], table.penalties, strict=True):
        assert low < penalty < high
    with pytest.raises(ValueError, match=r"none of the budgets 0.3, 0.6 can be kept to 0.01 on these 9 prompts, 0 of"):
        calibrate(model, routers, texts, budgets=[0.6, 0.3], tolerance=0.01, progress=False)


def test_guarded_prompts_bound_what_can_be_reached():
    model, (texts, _) = TINY, mixture(90, seed=6)
    routers = untrained(model, scale=4.0)
    means = prompt_means(model, texts)
    known = torch.nn.functional.normalize(means, dim=1)[:40]
    routers.guard = Guard(known, torch.zeros(32), 0.25)
    guarded = (1 - (torch.nn.functional.normalize(means, dim=1) @ known.T).amax(1) > 0.25).double().mean().item()
    assert 0.1 < guarded < 0.6
    budgets = [guarded - 0.05, guarded + 0.05, 1.0, 2 - guarded - 0.05, 2 - guarded + 0.05]
    table = calibrate(model, routers, texts, budgets=budgets, tolerance=0.01, progress=False)
    assert table.budgets == tuple(budgets[1:4]) and table.source["left_out"] == [budgets[0], budgets[4]]
    assert table.source["guarded"] == pytest.approx(guarded)
    routers.guard = Guard(-known, torch.zeros(32), 0.0)
    assert calibrate(model, routers, texts, budgets=[1.0], progress=False).source["guarded"] == 1
    with pytest.raises(ValueError, match="none of the budgets 0.9 .* 1 of which are guarded; the shares found are 1"):
        calibrate(model, routers, texts, budgets=[0.9], progress=False)


def hilly(penalty):
    """A share with many hills."""
    return 0.8 - 0.3 * math.tanh(penalty) + 0.1 * math.sin(9 * penalty)


def one_hill(penalty):
    """A share on straight lines: at -0.5 it has what it has at -1.2, and -1 is measured before either."""
    return float(np.interp(penalty, [-2, -1, -0.5, 0, 2], [1.2, 0.7, 0.8, 0.5, 0]))


@pytest.mark.parametrize("share, budgets", [(hilly, [0.6 + 0.01 * i for i in range(45)]), (one_hill, [0.6, 0.7, 0.8])])
def test_shares_that_rise_with_the_penalty(monkeypatch, share, budgets):
    """Blocks that see less may skip less. Penalties fall nevertheless."""

    def measured(model, prompts, listening, **named):
        listening.logits.append(torch.zeros(1, 3))  # that say nothing
        return torch.full((len(prompts), LAYERS), share(listening.routers.penalty), dtype=torch.float64)

    monkeypatch.setattr(module, "route_paths", measured)
    table = calibrate(TINY, untrained(TINY), [[3, 4]], budgets=budgets, tolerance=0.002, progress=False)
    assert len(table.budgets) > 0.9 * len(budgets)
    assert list(table.penalties) == sorted(table.penalties, reverse=True)
    for budget, penalty in zip(table.budgets, table.penalties, strict=True):
        assert share(penalty) == pytest.approx(budget, abs=0.002)


@pytest.mark.parametrize("guarded", [False, True])
def test_one_block_is_met_at_once(guarded):
    """What block 0 reads does not depend on the penalty, so that logits say where each budget is."""
    model, (texts, _) = tiny("llama", num_hidden_layers=1), mixture(300, seed=10)
    routers = untrained(model, scale=4.0)
    routers.guard = fit_guard(model, texts, prototypes=4, quantile=0.6) if guarded else None
    for budget in (0.7, 0.9, 1.3):
        source = calibrate(model, routers, texts, budgets=[budget], progress=False).source
        assert source["measurements"] <= 2 and source["kept"] == pytest.approx([budget], abs=0.005)
        assert source["guarded"] == pytest.approx(0.4 if guarded else 0, abs=0.01)


def test_few_measurements(deep, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "route_paths", lambda *a, **k: calls.append(1) or route_paths(*a, **k))
    table = calibrate(deep, untrained(deep, scale=4.0), mixture(200, seed=7)[0], budgets=[0.9], progress=False)
    assert len(calls) == table.source["measurements"] <= 8


def test_steps_of_the_visits():
    """Penalties read off logits are those at which decisions from these logits keep the budget."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 3, generator=generator)
    logits[::7] = torch.tensor([-math.inf, 0, -math.inf])
    budgets = [0.2, 0.5, 0.9, 1.0, 1.3, 1.8]
    for margin in (0.0, 0.8):
        for budget, penalty in zip(budgets, module._roots(logits, margin, budgets), strict=True):
            visits = 0
            for skip, execute, repeat in logits.tolist():
                scores = [skip - margin, execute - penalty, repeat - margin - 2 * penalty]
                visits += scores.index(max(scores))
            assert visits / 500 == pytest.approx(budget, abs=0.0041)  # a decision may take two visits at once


# -- guards
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
def test_means_are_of_what_enters_block_0(family):
    model, (texts, _) = tiny(family), mixture(7, seed=8)
    seen = []
    with torch.no_grad():
        handle = model.model.layers[0].register_forward_pre_hook(
            lambda block, args, kwargs: seen.append((args or tuple(kwargs.values()))[0][0].mean(0)), with_kwargs=True
        )
        for text in texts:
            model.model(input_ids=torch.tensor([text]), use_cache=False)
        handle.remove()
    for max_tokens in (1, 20, 8192):
        torch.testing.assert_close(prompt_means(model, texts, max_tokens=max_tokens), torch.stack(seen))


def test_a_fitted_guard_knows_its_prompts():
    model, (texts, kinds) = TINY, mixture(90, seed=9)
    own = [text for text, kind in zip(texts, kinds, strict=True) if kind != "c"]
    guard = fit_guard(model, own, prototypes=16, quantile=0.95)
    expected = Guard.fit(prompt_means(model, own), prototypes=16, quantile=0.95)
    assert torch.equal(guard.prototypes, expected.prototypes) and guard.radius == expected.radius
    other = fit_guard(model, own, prototypes=16, quantile=0.95, seed=1)
    assert not torch.equal(guard.prototypes, other.prototypes)
    routers = untrained(model)
    routers.guard, routers.penalty = guard, 1000.0
    assert route_paths(model, own, routers).double().mean().item() == pytest.approx(0.05, abs=0.02)


# -- refusals
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"budgets": []}, ValueError, "one or more shares"),
        ({"budgets": 0.9}, ValueError, "one or more shares"),
        ({"budgets": "0.9"}, ValueError, "one or more shares"),
        ({"budgets": [0.9, 0]}, ValueError, "above 0 .* and below 2 .*, got 0"),
        ({"budgets": [2.0]}, ValueError, "got 2.0"),
        ({"budgets": [math.nan]}, ValueError, "got nan"),
        ({"budgets": [True]}, TypeError, "a budget must be a number"),
        ({"budgets": ["0.9"]}, TypeError, "a budget must be a number"),
        ({"tolerance": 0}, ValueError, "tolerance must be"),
        ({"tolerance": math.nan}, ValueError, "tolerance must be"),
        ({"prompts": []}, ValueError, "no prompts to calibrate on"),
        ({"prompts": [[3], []]}, ValueError, r"prompts \[1\] have no tokens"),
        ({"groups": ["a"]}, ValueError, "2 prompts and 1 groups"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1"),
    ],
)
def test_refusals(monkeypatch, arguments, error, message):
    monkeypatch.setattr(module, "route_paths", None)
    with pytest.raises(error, match=message):
        calibrate(**({"model": TINY, "routers": untrained(TINY), "prompts": [[3, 4], [5]]} | arguments))


def test_routers_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(module, "route_paths", None)
    with pytest.raises(ValueError, match="these routers are for 'llama'"):
        calibrate(tiny("llama", seed=1), untrained(TINY), [[3, 4]])
    with pytest.raises(ValueError, match=f"for {LAYERS} layers of hidden size 32, the model has {DEEP}"):
        calibrate(tiny("llama", num_hidden_layers=DEEP), untrained(TINY), [[3, 4]])
    routers = untrained(TINY)
    routers.knob = 0.1
    with pytest.raises(ValueError, match="without the knob, and it is at 0.1"):
        calibrate(TINY, routers, [[3, 4]])


def test_weights_that_are_not_finite():
    model = tiny("llama")
    routers = untrained(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="layer 2: the hidden states of rows"):
        calibrate(model, routers, mixture(3, seed=0)[0], budgets=[1.5], progress=False)
    assert not hasattr(model.get_decoder(), "_drllm_routing")
