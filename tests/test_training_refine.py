"""Refining routers of small models: what is kept, held, continued and refused. The parts: test_training_draws.py."""

import json
from dataclasses import replace

import pytest
import torch
from characters import Characters
from families import LAYERS, tiny
from oracles import edited
from test_training_draws import Enumerated, routers_of

from drllm_fast import LayerRouters
from drllm_fast.budget import BudgetTable
from drllm_fast.paths import route_paths
from drllm_fast.search.evaluator import PathEvaluator
from drllm_fast.search.unit import Item
from drllm_fast.training import refine_state as module
from drllm_fast.training.descent import Descent
from drllm_fast.training.draws import budget_costs
from drllm_fast.training.path_values import PathValues
from drllm_fast.training.refine import refine
from drllm_fast.training.refine_config import RefineConfig
from drllm_fast.training.trackers import Tracker

WORDS = "a cat who sat on two red mats and went away from there".split()
ITEMS = [
    Item(str(i), "quiz", " ".join(WORDS[i % 5 : i % 5 + 2 + i % 7]) + f" {i}?", (" yes", " no", " a mat"), i % 3)
    for i in range(24)
]
CONFIG = RefineConfig(
    budgets=(0.9, 0.7), steps=8, batch_size=4, samples=4, learning_rate=3e-3, every=4, validation=0.25
)  # fmt: skip
TABLE = BudgetTable((0.7, 0.9), (0.5, 0.0))


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture
def routers(model):
    found = routers_of(model, scale=1.3)
    found.calibration = TABLE
    return found


def run(model, routers, items=ITEMS, config=CONFIG, **more):
    return refine(model, Characters(), routers, items, config=config, **{"progress": False} | more)


def weights(routers):
    return {name: tensor.clone() for name, tensor in routers.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def worth(monkeypatch, value):
    """Paths are worth what `value` says of paths int8 [n, P, L]; the number of calls, one before each."""
    calls = []

    def values(self, numbers, paths):
        assert paths.shape[0] == len(numbers)
        calls.append(list(numbers))
        return value(paths).double()

    monkeypatch.setattr(PathValues, "__call__", values)
    return calls


# -- values
def test_values_are_those_of_the_edited_model(model):
    items = [*ITEMS[:2], replace(ITEMS[3], choices=None, answer="seven")]
    paths = torch.tensor([[[1, 1, 1, 1], [0, 1, 2, 1]], [[1, 0, 1, 1]] * 2, [[2, 1, 1, 1], [1, 1, 0, 0]]])

    @torch.no_grad()
    def read(path, item, choice):
        """For each token of the choice: the choice up to it, the distribution, the token."""
        before, after = Characters().encode(item.prompt), Characters().encode(choice)
        logp = edited(model, path)(torch.tensor([before + after])).logits[0].log_softmax(-1)
        return [(choice[:i], logp[len(before) - 1 + i], token) for i, token in enumerate(after)]

    for reward in ("loglik", "margin", "kl"):
        some = items[:2] if reward == "margin" else items
        found = PathValues(model, Characters(), some, reward)(range(len(some)), paths[: len(some)])
        assert found.dtype == torch.float64 and found.shape == (len(some), 2)
        for n, item in enumerate(some):
            choices = item.choices or (" seven",)
            for p, path in enumerate(paths[n].tolist()):
                told = [read(path, item, choice) for choice in choices]
                dense = [read([1] * LAYERS, item, choice) for choice in choices]
                scores = [sum(logp[token].item() for _, logp, token in tokens) for tokens in told]
                right = scores.pop(0 if item.choices is None else item.answer)
                if reward == "kl":  # what several choices begin with is one place
                    pairs = zip(sum(dense, []), sum(told, []), strict=True)
                    kl = {begin: (d.exp() * (d - t)).sum().item() for (begin, d, _), (_, t, _) in pairs}
                    wanted = -sum(kl.values()) / len(kl)
                else:
                    wanted = right - (max(scores) if reward == "margin" else 0)
                assert found[n, p].item() == pytest.approx(wanted, abs=2e-4)


# -- what is learnt
@pytest.mark.parametrize("seed", [0, 1])
def test_two_routers_learn_to_go_together(model, monkeypatch, seed):
    """Worth something only if exactly one of two blocks is left out, and nothing says which."""
    worth(monkeypatch, lambda paths: ((paths[..., 1] == 0) ^ (paths[..., 2] == 0)) & (paths[..., 1:3] < 2).all(-1))
    routers = LayerRouters.for_model(model, router_size=6, windows=3, generator=torch.Generator().manual_seed(seed))
    config = replace(CONFIG, budgets=(0.75,), steps=150, every=50, samples=8, batch_size=8, learning_rate=1e-2)
    report = run(model, routers, config=config)
    first, last = report.measurements[0], report.measurements[report.kept]
    assert first.value < 0.6 and last.value > 0.95 and last.shares == pytest.approx([0.75])
    assert last.training["value"][0] > first.value


@pytest.mark.parametrize("pull", [2.0, -2.0])
def test_draws_keep_to_their_budgets(model, routers, monkeypatch, pull):
    """Whatever the value says of the number of visits."""
    noise = torch.tensor([0.3, -0.2, 0.1, 0.0])
    worth(monkeypatch, lambda paths: (paths.float() * (pull + noise)).sum(-1))
    config = replace(CONFIG, budgets=(0.5, 0.7, 0.95), steps=120, every=60, batch_size=9, samples=6, learning_rate=1e-4)
    report = run(model, routers, config=config)
    assert report.measurements[-1].training["share"] == pytest.approx([0.5, 0.7, 0.95], abs=0.015)
    # What a visit is worth, as the price of a share: 4 visits of about `pull`.
    assert report.measurements[-1].training["price"] == pytest.approx([4 * pull] * 3, rel=0.15)
    assert report.measurements[-1].shares == pytest.approx([0.5, 0.7, 0.95], abs=1e-6)


def test_a_step_goes_along_the_budget(monkeypatch):
    """The gradient of a step against that of the expected value on the line where the penalty keeps the share,
    all 27 paths written out."""
    model = tiny("llama", num_hidden_layers=3)
    routers, item = routers_of(model, scale=1.3), ITEMS[4]
    table = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(6)).double()
    worth(monkeypatch, lambda paths: table[tuple(paths.long().unbind(-1))] + 10 * paths.sum(-1))
    gradients = []

    def descend(self, loss, clip):
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.weights)]))
        return 0.0

    monkeypatch.setattr(module.Refinement, "descend", descend)
    config = replace(CONFIG, budgets=(0.8,), batch_size=1, samples=4000, temperature=0.8, anchor=0.0)
    values = PathValues(model, Characters(), [item], "loglik")
    state = module.Refinement(model, routers, values, module.np.array([0]), module.np.array([0]), config, 10**6)
    state.penalties = torch.tensor([0.3], dtype=torch.float64)
    figures = state.take_step()
    exact = Enumerated(model, routers, Characters().encode(item.prompt))
    penalty = torch.tensor(0.3, requires_grad=True)
    p = exact.probabilities(penalty)
    value, share = (p * values(range(1), exact.paths[None])[0].float()).sum(), (p * exact.paths.float().mean(1)).sum()
    of_value, of_share = (torch.autograd.grad(f, [penalty, *exact.weights], retain_graph=True) for f in (value, share))
    price = (of_value[0] / of_share[0]).item()
    along = torch.cat([(v - price * s).flatten() for v, s in zip(of_value[1:], of_share[1:], strict=True)])
    plain = torch.cat([v.flatten() for v in of_value[1:]])
    assert figures["price"].item() == pytest.approx(price, rel=0.1) and price > 25
    assert torch.cosine_similarity(-gradients[0], along, dim=0) > 0.99
    assert torch.cosine_similarity(-gradients[0], plain, dim=0) < 0.5
    assert figures["share"].item() == pytest.approx(share.item(), abs=0.03)
    assert state.penalties.item() == pytest.approx(0.3 + figures["share"].item() - 0.8)


def test_the_anchor_holds_the_routers_back(model, routers):
    before, moved = weights(routers), []
    for anchor in (0.0, 1e3):
        copy = routers_of(model, scale=1.3)
        report = run(model, copy, config=replace(CONFIG, anchor=anchor, steps=20, every=20))
        moved.append(report.measurements[-1].training["anchor"])
    assert 0 < moved[1] < moved[0] / 3 and same(before, weights(routers_of(model, scale=1.3)))


def test_a_gradient_is_clipped():
    routers = LayerRouters(num_layers=2, hidden_size=4, router_size=3)
    descent = Descent(routers, learning_rate=1e-3, weight_decay=0.0)
    norm = descent.descend(sum(100 * weight.sum() for weight in descent.weights), clip=2.0)
    count = sum(weight.numel() for weight in descent.weights)
    assert norm == pytest.approx(100 * count**0.5)
    assert sum(weight.grad.square().sum() for weight in descent.weights).item() == pytest.approx(4, rel=1e-4)


def test_every_prompt_has_its_turn(model, routers, monkeypatch):
    calls = worth(monkeypatch, lambda paths: paths.sum(-1))
    report = run(model, routers, config=replace(CONFIG, steps=9, every=9))
    assert len(report.validation) == 6 and report.training == 18 and len(calls) == 11
    assert calls[0] == calls[-1] == report.validation
    turns = sum(calls[1:-1], [])
    assert sorted(turns[:18]) == sorted(turns[18:]) == sorted(set(range(24)) - set(report.validation))
    assert turns[:18] != turns[18:]


# -- what is kept
def test_the_figures_are_those_of_the_routers(model, routers):
    report = run(model, routers, config=replace(CONFIG, steps=40, every=20, samples=8, learning_rate=1e-2))
    assert report.kept > 0 and routers.calibration is None
    held = [ITEMS[n] for n in report.validation]
    prompts = [Characters().encode(item.prompt) for item in held]
    found = report.measurements[report.kept]
    evaluator = PathEvaluator(model, Characters())
    for k, budget in enumerate(CONFIG.budgets):
        values, shares = [], []
        for penalty in found.penalties[k]:
            routers.penalty = penalty
            plans = route_paths(model, prompts, routers)
            shares.append(plans.double().mean().item())
            kl = [evaluator.divergence(i.prompt, i.choices, plan).item() for i, plan in zip(held, plans, strict=True)]
            values.append(-sum(kl) / len(kl))
        assert shares[0] >= budget >= shares[1] and found.shares[k] == pytest.approx(budget)
        part = (budget - shares[1]) / (shares[0] - shares[1]) if shares[0] > shares[1] else 0.5
        assert found.values[k] == pytest.approx(part * values[0] + (1 - part) * values[1], abs=1e-5)
    text = report.text()
    assert "held out of 24" in text and f"Kept are the routers of step {found.step}" in text
    assert f"budget 0.7: {report.measurements[0].values[0]:.4f} -> {found.values[0]:.4f}" in text
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["kept"] == report.kept


def test_without_gain_nothing_changes(model, routers, monkeypatch):
    calls = []

    def worse(paths):
        calls.append(1)
        return -torch.full(paths.shape[:2], float(len(calls)))

    worth(monkeypatch, worse)
    before = weights(routers)
    report = run(model, routers)
    assert report.kept == 0 and len(report.measurements) == 3 and "The routers are unchanged" in report.text()
    assert same(weights(routers), before) and routers.calibration == TABLE


def test_the_best_is_kept_and_not_the_last(model, routers, monkeypatch):
    """Held-out values rise once and fall again."""
    order, states = iter([0.0, 2.0, 1.0]), []
    worth(monkeypatch, lambda paths: paths.sum(-1))
    measured = module.Refinement.measure

    def measure(self, begun, steps):
        states.append([weight.detach().clone() for weight in self.weights])
        value = next(order)
        return replace(measured(self, begun, steps), values=[value, value])

    monkeypatch.setattr(module.Refinement, "measure", measure)
    report = run(model, routers)
    assert report.kept == 1
    assert all(torch.equal(w, p) for w, p in zip(states[1], routers.parameters(), strict=True))
    assert not torch.equal(states[1][0], states[2][0])


# -- going on
class Stop(Exception):
    pass


@pytest.mark.parametrize("stopped", [1, 4, 7])
def test_a_stopped_refinement_goes_on(model, routers, tmp_path, monkeypatch, stopped):
    class Counting(Tracker):
        def __init__(self):
            self.told = []

        def log(self, values, step):
            self.told.append((step, values["validation/value"]))

    whole = routers_of(model, scale=1.3)
    random = torch.get_rng_state()
    trackers = Counting(), Counting()
    one = run(model, whole, tracker=trackers[0])
    assert torch.equal(torch.get_rng_state(), random)
    taken, step = [], module.Refinement.take_step

    def stops(self):
        if len(taken) == stopped:
            taken.append(None)
            raise Stop
        taken.append(1)
        return step(self)

    before = weights(routers)
    monkeypatch.setattr(module.Refinement, "take_step", stops)
    with pytest.raises(Stop):
        run(model, routers, folder=tmp_path, tracker=trackers[1])
    assert same(weights(routers), before) and routers.calibration == TABLE
    other = run(model, routers, folder=tmp_path, tracker=trackers[1])
    assert len(taken) - 1 == stopped + 8 - stopped // 4 * 4
    assert same(weights(routers), weights(whole)) and not same(weights(routers), before)
    assert [replace(m, seconds=0) for m in one.measurements] == [replace(m, seconds=0) for m in other.measurements]
    assert trackers[0].told == trackers[1].told and [told[0] for told in trackers[0].told] == [0, 4, 8]

    refreshed = routers_of(model, scale=1.3)
    monkeypatch.setattr(module.Refinement, "take_step", None)  # all is done
    run(model, refreshed, folder=tmp_path)
    assert same(weights(refreshed), weights(whole))
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for more, words in (
        ({"config": replace(CONFIG, reward="loglik")}, "config.reward is 'kl', not 'loglik'"),
        ({"items": ITEMS[:-1]}, "prompts is"),
        ({"units": [str(n // 2) for n in range(len(ITEMS))]}, "held out is"),
        ({"routers": routers_of(model, seed=1)}, "first weights is"),
    ):
        with pytest.raises(ValueError, match=f"holds another fit.*{words}"):
            run(**{"model": model, "routers": routers_of(model, scale=1.3), "folder": tmp_path} | more)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files


# -- what is refused
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reward": "exact"}, "reward must be one of kl, margin, loglik"),
        ({"budgets": ()}, "budgets must be different shares"),
        ({"budgets": (0.9, 0.9)}, "budgets must be different shares"),
        ({"budgets": (0.9, 2.0)}, "budgets must be different shares"),
        ({"budgets": "0.9"}, "budgets must be numbers such as"),
        ({"samples": 1}, "samples must be an integer from 2"),
        ({"batch_size": 1}, "batch_size must be at least 2, a prompt for each budget"),
        ({"steps": 0}, "steps must be an integer from 1"),
        ({"temperature": 0.0}, "temperature must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"clip": 0.0}, "clip must be"),
        ({"anchor": -1.0}, "anchor must be"),
        ({"validation": 0.0}, "validation must be above 0"),
    ],
)
def test_settings_out_of_range(change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        replace(CONFIG, **change)


def test_what_does_not_fit_is_refused(model, routers, tmp_path):
    free = replace(ITEMS[0], choices=None, answer="seven")
    long = replace(ITEMS[0], id="long", prompt="why " * 80)
    other = LayerRouters(num_layers=LAYERS, hidden_size=16)
    turned = routers_of(model)
    turned.knob = 0.0
    for changes, words in (
        ({"config": replace(CONFIG, reward="margin"), "items": [*ITEMS, free]}, "margin compares choices.*has none"),
        ({"config": replace(CONFIG, reward="margin"), "items": [replace(ITEMS[0], choices=(" a",))] * 8}, "has 1"),
        ({"items": [*ITEMS, long]}, "item long of quiz has .* tokens .* 256 positions"),
        ({"items": ITEMS[:1]}, "1 prompts are too few"),
        ({"items": ITEMS[:2]}, "1 prompts to train on are too few for 2 budgets"),
        ({"items": ["a", "b"]}, "items must be those of"),
        ({"routers": other}, "these routers are for 4 layers of hidden size 16"),
        ({"routers": turned}, "without the knob"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            run(**{"model": model, "routers": routers, "folder": tmp_path / "new"} | changes)
    assert not (tmp_path / "new").exists()


def test_a_value_that_is_not_finite_ends_it(model, routers, monkeypatch):
    calls, real = [], PathEvaluator.measure_many

    def spoilt(self, requests):
        found = real(self, requests)
        calls.append(1)
        if len(calls) == 3:
            found[1][1][2] = float("nan")
        return found

    monkeypatch.setattr(PathEvaluator, "measure_many", spoilt)
    before = weights(routers)
    with pytest.raises(FloatingPointError, match=r"the kl of item \d+ of quiz is nan under the path \[.*as they were"):
        run(model, routers)
    assert same(weights(routers), before) and routers.calibration == TABLE
    bad = routers_of(model)
    with torch.no_grad():
        bad.b2[2, 1] = float("inf")
    monkeypatch.undo()
    with pytest.raises(FloatingPointError, match=r"block 2, row \d+: the routers' logits are not finite"):
        run(model, bad)


def test_costs_are_those_of_the_routers(routers):
    routers.margin = 0.25
    for penalty in (-0.5, 0.7):
        routers.penalty = penalty
        assert budget_costs(torch.tensor([penalty]), 0.25).tolist()[0] == pytest.approx(routers.costs)
