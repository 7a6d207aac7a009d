"""The static policy: its two criteria, the greedy ranking, and a model that is left as it was."""

import json
import math

import pytest
import torch
from families import LAYERS, prompts, tiny
from hypothesis import given
from hypothesis import strategies as st
from oracles import padded
from torch import nn

import drllm_fast  # noqa: F401  puts enable_dynamic_routing on models
from drllm_fast.influence import StaticPolicy, block_influence, calibration_texts, cka_distance
from drllm_fast.policies import PromptBatch, RoutingPolicy

TEXTS = ["the first prompt", "a second and somewhat longer prompt of the calibration text", "x", "and a last one"]
CRITERIA = ["block-influence", "cka"]


def tokenizer(text):
    """One id of the tiny models' 97 for each character."""
    return {"input_ids": [1 + ord(c) % 96 for c in text]}


def random_states(n, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n, d, generator=g)


# -- criteria ---------------------------------------------------------------------------------------------------------
def oracle_influence(x, y):
    total = 0.0
    for a, b in zip(x.double(), y.double(), strict=True):
        total += 1 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
    return total / len(x)


def oracle_cka(x, y):
    """1 - HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of linear kernels, with the centring matrix written out."""
    n = len(x)
    h = torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)
    k, m = x.double() @ x.double().T, y.double() @ y.double().T

    def hsic(a, b):
        return float(torch.trace(a @ h @ b @ h)) / (n - 1) ** 2

    return 1 - hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize("n, d", [(2, 5), (5, 5), (40, 8), (8, 40), (9, 8), (8, 9)])
@pytest.mark.parametrize("shift", [0, 30])
def test_criteria_against_other_formulas(n, d, shift):
    x, noise = random_states(n, d)
    for y in (noise + shift, x + 0.3 * noise + shift, x):
        assert block_influence(x, y) == pytest.approx(oracle_influence(x, y), abs=1e-6)
        assert cka_distance(x, y) == pytest.approx(oracle_cka(x, y), abs=1e-9)


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 99))
def test_cka_is_a_distance_from_0_to_1(n, d, seed):
    x, y = random_states(n, d, seed)
    assert -1e-9 <= cka_distance(x, y) <= 1 + 1e-9
    assert cka_distance(x, y) == pytest.approx(cka_distance(y, x), abs=1e-9)


def test_what_the_criteria_ignore():
    x, _ = random_states(30, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    assert cka_distance(x, 3 * x @ rotation + 5) == pytest.approx(0, abs=1e-6)
    assert block_influence(x, 3 * x) == pytest.approx(0, abs=1e-6)
    assert block_influence(x, -x) == pytest.approx(2, abs=1e-6)


def test_cka_of_states_that_do_not_vary():
    x, _ = random_states(6, 4)
    constant = torch.ones(6, 4)
    assert cka_distance(constant, constant + 1) == 0 and cka_distance(x, constant) == cka_distance(constant, x) == 1


def test_criteria_read_half_precision_in_full():
    x, y = (z.bfloat16() for z in random_states(50, 8))
    assert block_influence(x, y) == pytest.approx(oracle_influence(x, y), abs=1e-6)
    assert cka_distance(x, y) == pytest.approx(oracle_cka(x, y), abs=1e-9)


# -- calibration ------------------------------------------------------------------------------------------------------
def oracle_scores(model, layers, criterion):
    """The influence of each of `layers` when the model has these alone, by way of output_hidden_states."""
    model.model.layers, model.config.num_hidden_layers = nn.ModuleList(layers), len(layers)
    ends = []  # the last hidden state, which output_hidden_states gives after the final norm only
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: ends.append(args[0][0]))
    states = [[] for _ in layers]
    for text in TEXTS:
        with torch.no_grad():
            out = model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True, use_cache=False)
        for entering, h in zip(states, out.hidden_states, strict=False):
            entering.append(h[0])
    handle.remove()
    joined = [torch.cat(s) for s in (*states, ends)]
    score = {"block-influence": oracle_influence, "cka": oracle_cka}[criterion]
    return [score(joined[i], joined[i + 1]) for i in range(len(layers))]


def greedy_oracle(model, criterion):
    """All blocks but the last one left in the order of their removal, from lists of layers with some taken out."""
    whole = list(model.model.layers)
    left, order = list(range(len(whole))), []
    while len(left) > 1:
        scores = oracle_scores(model, [whole[i] for i in left], criterion)
        order.append(left.pop(scores.index(min(scores))))
    model.model.layers, model.config.num_hidden_layers = nn.ModuleList(whole), len(whole)
    return order


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family, seed", [("llama", 0), ("llama", 3), ("llama", 6), ("gemma2", 0), ("gemma2", 3)])
def test_the_greedy_order_is_that_of_a_model_with_layers_taken_out(criterion, family, seed):
    model = tiny(family, seed, **({"num_hidden_layers": 8} if family == "llama" else {}))
    layers = len(model.model.layers)
    policy = StaticPolicy.calibrate(model, tokenizer, TEXTS, budget=1 / layers, criterion=criterion, progress=False)
    assert list(policy.order) == greedy_oracle(model, criterion)
    assert policy.criterion == criterion and policy.num_layers == layers
    if (family, seed) == ("llama", 0):  # here ranking once, without the removals, gives another order
        scores = oracle_scores(model, list(model.model.layers), criterion)
        assert sorted(range(layers), key=scores.__getitem__)[:-1] != list(policy.order)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("identity", range(LAYERS))
def test_an_identity_block_goes_first(criterion, identity):
    model = tiny("llama")
    for linear in (model.model.layers[identity].self_attn.o_proj, model.model.layers[identity].mlp.down_proj):
        nn.init.zeros_(linear.weight)
    policy = StaticPolicy.calibrate(model, tokenizer, TEXTS, budget=0.75, criterion=criterion, progress=False)
    assert policy.order == (identity,)
    assert policy.path == tuple(int(i != identity) for i in range(LAYERS))
    inputs = padded(prompts([5, 9]))
    with torch.no_grad():
        dense = model(**inputs).logits
        routed = model.enable_dynamic_routing(policy)(**inputs).logits
    torch.testing.assert_close(routed[:, -1], dense[:, -1], atol=1e-4, rtol=1e-4)
    assert model.routing.plan.tolist() == [list(policy.path)] * 2


def snapshot(model):
    modules = list(model.modules())
    return (
        [type(m) for m in modules],
        [m.training for m in modules],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
        {k: v.clone() for k, v in model.state_dict().items()},
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = tiny("llama").train()
    model.model.layers[1].mlp.eval()
    before, calls = snapshot(model), []

    def tokenize(text):
        return tokenizer(text)

    def interrupt(module, args, output):
        calls.append(module.training or torch.is_grad_enabled())
        if fails and len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_hook(interrupt)
    try:
        StaticPolicy.calibrate(model, tokenize, TEXTS, budget=0.5, progress=False)
        assert not fails
    except KeyboardInterrupt:
        assert fails
    handle.remove()
    assert calls and not any(calls)  # it ran in evaluation mode, and without gradients
    *states, weights = snapshot(model)
    assert states == list(before[:3])
    assert all(torch.equal(weights[k], v) for k, v in before[3].items())
    assert all(p.grad is None for p in model.parameters())


def test_wrapped_and_inner_models():
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    expected = StaticPolicy.calibrate(model, tokenizer, TEXTS, budget=0.5, progress=False).order
    assert StaticPolicy.calibrate(model.model, tokenizer, TEXTS, budget=0.5, progress=False).order == expected
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert StaticPolicy.calibrate(wrapped, tokenizer, TEXTS, budget=0.5, progress=False).order == expected


def lengths_seen(texts, **kwargs):
    model, seen = tiny("llama", max_position_embeddings=32), []
    handle = model.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[:2]))
    StaticPolicy.calibrate(model, tokenizer, texts, budget=0.75, progress=False, **kwargs)
    handle.remove()
    assert all(rows == 1 for rows, _ in seen)
    return [n for _, n in seen]


def test_how_much_is_read():
    assert lengths_seen(["a" * 10, "b" * 20]) == [10, 20]
    assert lengths_seen(["a" * 10, "b" * 20], max_tokens=15) == [10, 5]
    assert lengths_seen(["a" * 10, "b" * 20], max_tokens=10) == [10]
    assert lengths_seen(["a" * 70, "", "b"]) == [32, 32, 6, 1]  # no longer than the model's positions


def test_the_bundled_text():
    texts = calibration_texts()
    words = sum(len(text.split()) for text in texts)
    assert 10 <= len(texts) <= 20 and 1200 <= words <= 1500 and all(texts) and not any("----" in t for t in texts)
    assert sum(lengths_seen(None)) == 2048


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"criterion": "entropy"}, ValueError, "one of block-influence, cka, got 'entropy'"),
        ({"budget": 0}, ValueError, "budget must be above 0"),
        ({"budget": 1.5}, ValueError, "budget must be above 0"),
        ({"budget": math.nan}, ValueError, "budget must be above 0"),
        ({"budget": "80%"}, TypeError, "budget must be a number"),
        ({"budget": 0.1}, ValueError, "leaves none of 4 blocks; give 0.25 or more"),
        ({"texts": "one text"}, ValueError, "list of strings"),
        ({"texts": []}, ValueError, "fewer than 2 tokens"),
        ({"texts": ["x"]}, ValueError, "fewer than 2 tokens"),
        ({"max_tokens": 1}, ValueError, "max_tokens must be at least 2"),
    ],
)
def test_calibration_refuses(changes, error, message):
    arguments = {"texts": TEXTS, "budget": 0.75, "progress": False}
    with pytest.raises(error, match=message):
        StaticPolicy.calibrate(tiny("llama"), tokenizer, **(arguments | changes))


def test_routed_models_and_nan_are_refused():
    model = tiny("llama")
    for routed in (model, model.model):
        routed.enable_dynamic_routing([1, 1, 1, 1])
        for part in (model, model.model):
            with pytest.raises(ValueError, match="routed; call model.disable_dynamic_routing"):
                StaticPolicy.calibrate(part, tokenizer, TEXTS, budget=0.75, progress=False)
        routed.disable_dynamic_routing()
    nn.init.constant_(model.model.layers[2].mlp.down_proj.weight, math.nan)
    with pytest.raises(ValueError, match="block 2 are not finite"):
        StaticPolicy.calibrate(model, tokenizer, TEXTS, budget=0.75, progress=False)
    with pytest.raises(TypeError, match="PreTrainedModel"):
        StaticPolicy.calibrate(nn.Linear(2, 2), tokenizer, TEXTS, budget=0.75)


def test_progress_is_shown_where_asked_for(capsys):
    for progress in (False, True):
        StaticPolicy.calibrate(tiny("llama"), tokenizer, TEXTS, budget=0.75, progress=progress)
        assert ("ranking blocks" in capsys.readouterr().err) == progress


# -- the policy -------------------------------------------------------------------------------------------------------
def test_budget_and_path():
    policy = StaticPolicy([3, 0, 7], num_layers=10, budget=0.7)
    assert policy.path == (0, 1, 1, 0, 1, 1, 1, 0, 1, 1)
    policy.budget = 0.8
    assert policy.path == (0, 1, 1, 0, 1, 1, 1, 1, 1, 1)
    policy.budget = 0.94
    assert policy.path == (1, 1, 1, 0, 1, 1, 1, 1, 1, 1)
    policy.budget = 1
    assert policy.path == (1,) * 10
    with pytest.raises(ValueError, match="budget 0.6 skips 4 of 10 blocks, but only 3 are ranked; .* 0.7 or more"):
        policy.budget = 0.6
    assert policy.budget == 1
    assert isinstance(policy, RoutingPolicy)


@pytest.mark.parametrize("budget", [0.8, 0.9, 0.7, 0.55])
@pytest.mark.parametrize("layers", [4, 16, 28, 30, 32])
def test_the_share_kept_is_the_budget_to_half_a_block(budget, layers):
    path = StaticPolicy(range(layers), num_layers=layers, budget=budget).path
    assert abs(sum(path) - budget * layers) <= 0.5 + 1e-9


def test_route_and_bind():
    policy = StaticPolicy([2], num_layers=4, budget=0.75)
    prompt_batch = PromptBatch(torch.zeros(5, 8), torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    plan = policy.route(0, prompt_batch)
    assert plan.dtype == torch.int8 and plan.tolist() == [[1, 1, 0, 1]] * 3
    policy.bind(tiny("llama"))
    with pytest.raises(ValueError, match="ranks 4 blocks, the model has 3"):
        policy.bind(tiny("llama", num_hidden_layers=3))
    model = tiny("llama").enable_dynamic_routing(policy, budget=1.0)
    assert policy.budget == 1 and model.routing.budget == 1


@pytest.mark.parametrize(
    "order, changes, error",
    [
        ([4], {}, ValueError), ([-1], {}, ValueError), ([1, 1], {}, ValueError), ([1.0], {}, TypeError),
        ([True], {}, TypeError), ([1], {"num_layers": 0}, ValueError), ([1], {"num_layers": 4.0}, TypeError),
        ([1], {"criterion": "x"}, ValueError), ([], {}, ValueError),
    ],
)  # fmt: skip
def test_bad_policies(order, changes, error):
    with pytest.raises(error):
        StaticPolicy(order, **({"num_layers": 4, "budget": 0.75} | changes))


def test_save_and_load(tmp_path):
    policy = StaticPolicy([3, 0, 7], num_layers=10, budget=0.8, criterion="cka")
    policy.save(tmp_path / "policy.json")
    loaded = StaticPolicy.load(tmp_path / "policy.json")
    assert repr(loaded) == repr(policy) and loaded.order == (3, 0, 7) and loaded.path == policy.path
    data = json.loads((tmp_path / "policy.json").read_text())
    for damage in (
        {"order": [99]}, {"order": "03"}, {"order": None}, {"budget": 0.1}, {"format_version": 2}, {"more": 1}
    ):  # fmt: skip
        (tmp_path / "policy.json").write_text(json.dumps(data | damage))
        with pytest.raises(ValueError, match="policy.json holds no static policy"):
            StaticPolicy.load(tmp_path / "policy.json")
    (tmp_path / "policy.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no static policy"):
        StaticPolicy.load(tmp_path / "policy.json")
    (tmp_path / "policy.json").write_text("{")
    with pytest.raises(OSError, match="policy.json is damaged"):
        StaticPolicy.load(tmp_path / "policy.json")
    with pytest.raises(FileNotFoundError):
        StaticPolicy.load(tmp_path / "none.json")
