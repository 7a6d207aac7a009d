"""Draws, their gradient and the price of visits, against all 3^L paths of a small model written out."""

import itertools

import numpy as np
import pytest
import torch
from families import prompts, tiny

from drllm_fast.guard import Guard
from drllm_fast.paths import route_paths
from drllm_fast.router_reference import router_logits
from drllm_fast.routers import LayerRouters
from drllm_fast.training.advantages import Prices, leave_one_out, normalised, slopes
from drllm_fast.training.bracket import bracket
from drllm_fast.training.calibrate import fit_guard
from drllm_fast.training.draws import budget_costs, draw, gumbel, log_probabilities
from drllm_fast.training.refine_state import path_log_probability
from drllm_fast.training.windows import pool_examples

LENGTHS = [9, 1, 17, 8, 3, 24]
TEXTS = [prompt.tolist() for prompt in prompts(LENGTHS)]
TEMPERATURE = 0.8


def routers_of(model, seed=0, scale=3.0, windows=3):
    """Routers whose choices depend on what they see."""
    generator = torch.Generator().manual_seed(seed)
    routers = LayerRouters.for_model(model, router_size=6, windows=windows, generator=generator)
    with torch.no_grad():
        routers.w1 *= scale
        routers.w2 *= scale
    return routers


def by_hand(windows, weights):
    """[N, L, 3], block by block, by the reference of one router."""
    layers = zip(windows.pooled, *weights, strict=True)
    return torch.stack([router_logits(pooled, windows.counts, *own) for pooled, *own in layers], 1)


class Enumerated:
    """All paths of one prompt: E(f) is the exact expectation of f [27] under draws at a penalty."""

    def __init__(self, model, routers, prompt):
        layers = routers.num_layers
        self.paths = torch.tensor(list(itertools.product(range(3), repeat=layers)), dtype=torch.int8)
        self.windows = pool_examples(model, [prompt] * len(self.paths), self.paths, windows=routers.windows, progress=0)
        self.weights = [parameter.detach().clone().requires_grad_() for parameter in routers.parameters()]
        self.visits = torch.tensor([0.0, 1.0, 2.0])

    def probabilities(self, penalty):
        logits = by_hand(self.windows, self.weights) - penalty * self.visits
        each = (logits / TEMPERATURE).softmax(-1)
        return each.gather(2, self.paths.long().unsqueeze(2)).prod(1).squeeze(1)


@pytest.fixture(scope="module")
def small():
    """A model of three blocks, routers, and the 27 paths of a prompt."""
    model = tiny("llama", num_hidden_layers=3)
    routers = routers_of(model, scale=1.3)
    return model, routers, Enumerated(model, routers, TEXTS[0])


def drawn_from(small, rows, seed=0, penalty=0.3):
    model, routers, _ = small
    noise = TEMPERATURE * gumbel(np.random.default_rng(seed), rows, routers.num_layers)
    costs = budget_costs(torch.full((rows,), penalty, dtype=torch.float64), 0.0)
    found = draw(
        model, [TEXTS[0]] * rows, list(routers.parameters()), costs, windows=routers.windows, noise=noise,
        max_tokens=20000,
    )  # fmt: skip
    return found, costs


# -- draws
@pytest.mark.parametrize("max_tokens", [30, 8192])
def test_a_draw_and_what_it_saw(max_tokens):
    model = tiny("llama")
    routers, rows = routers_of(model), 2 * len(TEXTS)
    texts = TEXTS + TEXTS
    noise = TEMPERATURE * gumbel(np.random.default_rng(1), rows, routers.num_layers)
    penalties = torch.linspace(-0.5, 1, rows, dtype=torch.float64)
    costs = budget_costs(penalties, 0.2)
    assert torch.equal(costs, torch.stack([torch.full((rows,), 0.2), penalties, 0.2 + 2 * penalties], 1).float())
    weights = list(routers.parameters())
    found = draw(model, texts, weights, costs, windows=3, noise=noise, max_tokens=max_tokens)
    assert found.paths.dtype == torch.int8 and len({tuple(path) for path in found.paths.tolist()}) > 6
    assert not hasattr(model.get_decoder(), "_drllm_routing")

    pooled = pool_examples(model, texts, found.paths, windows=3, progress=False)
    torch.testing.assert_close(found.windows.pooled, pooled.pooled, atol=1e-5, rtol=1e-5)
    assert found.windows.counts.tolist() == [min(3, len(text)) for text in texts]
    scores = by_hand(pooled, weights) - costs.unsqueeze(1) + noise
    top = scores.topk(2).values
    assert (top[..., 0] - top[..., 1]).min() > 1e-4  # no decision hangs on rounding
    assert torch.equal(scores.argmax(-1).to(torch.int8), found.paths)
    expected = ((by_hand(pooled, weights) - costs.unsqueeze(1)) / TEMPERATURE).log_softmax(-1)
    log_p = log_probabilities(found.windows, weights, costs, TEMPERATURE)
    torch.testing.assert_close(log_p, expected, atol=1e-4, rtol=1e-4)
    some = draw(model, texts, weights, costs, windows=3, noise=noise, keep=False)
    assert some.windows is None and torch.equal(some.paths, found.paths)


def test_without_noise_it_is_what_the_routers_decide():
    model = tiny("llama")
    routers = routers_of(model, scale=1.5)
    routers.margin = 0.1
    guard = fit_guard(model, TEXTS[:2], prototypes=2)
    far = sorted(guard.distances(torch.stack([model.get_input_embeddings()(torch.tensor(t)).mean(0) for t in TEXTS])))
    plain = None
    for own in (None, Guard(guard.prototypes, guard.centre, (far[2] + far[3]).item() / 2)):
        routers.guard = own
        for penalty in (-0.3, 0.0, 0.2):
            routers.penalty = penalty
            costs = budget_costs(torch.full((len(TEXTS),), penalty, dtype=torch.float64), routers.margin)
            found = draw(
                model, TEXTS, list(routers.parameters()), costs, windows=3, guard=routers.guard, keep=False
            ).paths
            assert torch.equal(found, route_paths(model, TEXTS, routers))
            if own is not None:
                assert (found == 1).all(1).sum() >= 3
        assert plain is None or not torch.equal(plain, found)
        plain = found


def test_paths_are_drawn_as_often_as_their_probability_says(small):
    rows = 6000
    found, _ = drawn_from(small, rows)
    number = found.paths.long() @ torch.tensor([9, 3, 1])
    share = torch.bincount(number, minlength=27) / rows
    expected = small[2].probabilities(0.3).detach()
    assert expected.sum().item() == pytest.approx(1, abs=1e-5) and expected.max() < 0.5
    often = expected > 1e-3
    assert often.sum() > 12
    z = (share - expected) / (expected * (1 - expected) / rows).sqrt()
    assert z[often].abs().max() < 4.5


# -- the gradient
def test_the_gradient_is_that_of_the_expected_reward(small):
    model, routers, exact = small
    rewards = torch.randn(27, generator=torch.Generator().manual_seed(3)) + 2
    wanted = torch.autograd.grad((exact.probabilities(0.3) * rewards).sum(), exact.weights)
    wanted = torch.cat([g.flatten() for g in wanted])
    estimates = []
    for seed in range(20):
        found, costs = drawn_from(small, 2400, seed)
        drawn = rewards[found.paths.long() @ torch.tensor([9, 3, 1])].double()
        advantages = leave_one_out(drawn.view(-1, 2)).flatten()
        weights = [parameter.detach().requires_grad_() for parameter in routers.parameters()]
        log_p = log_probabilities(found.windows, weights, costs, TEMPERATURE)
        gradient = torch.autograd.grad((advantages * path_log_probability(log_p, found.paths)).mean(), weights)
        estimates.append(torch.cat([g.flatten() for g in gradient]).float())
    estimates = torch.stack(estimates)
    mean, error = estimates.mean(0), estimates.std(0) / len(estimates) ** 0.5
    # Along the gradient itself, where a wrong scale shows; and everywhere.
    along = estimates @ wanted / wanted.norm()
    assert abs(along.mean() - wanted.norm()) < 4 * along.std() / len(along) ** 0.5 < 0.2 * wanted.norm()
    seen = error > 0
    assert seen.sum() > 500 and ((mean - wanted)[seen].abs() / error[seen]).square().mean() < 1.5


def test_the_price_is_what_the_penalty_costs(small):
    model, routers, exact = small
    values = torch.randn(27, generator=torch.Generator().manual_seed(4)).double()
    values += exact.paths.double().sum(1)
    penalty = torch.tensor(0.3, requires_grad=True)
    shares = exact.paths.double().mean(1)
    of_value, of_share = (
        torch.autograd.grad((exact.probabilities(penalty) * f).sum(), penalty)[0].item() for f in (values, shares)
    )
    found, costs = drawn_from(small, 8000)
    log_p = log_probabilities(found.windows, list(routers.parameters()), costs, TEMPERATURE)
    number = found.paths.long() @ torch.tensor([9, 3, 1])
    slope = slopes(log_p, found.paths, TEMPERATURE).view(-1, 4)
    prices, budgets = Prices(2), torch.arange(2000) % 2
    for _ in range(2):
        prices.tell(values[number].view(-1, 4), shares[number].view(-1, 4), slope, budgets)
    assert (prices.moments[:, 1] / 0.19).tolist() == pytest.approx([of_share] * 2, rel=0.1)
    assert prices.of_a_share().tolist() == pytest.approx([of_value / of_share] * 2, rel=0.15)
    assert of_value / of_share > 1 and Prices(2).of_a_share().tolist() == [0, 0]


def test_advantages():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0], [4.0, 8.0, 0.0]], dtype=torch.float64)
    wanted = [[1 - 4, 2 - 3.5, 6 - 1.5], [0, 0, 0], [4 - 4, 8 - 2, 0 - 6]]
    advantages = leave_one_out(rewards)
    assert advantages.flatten().tolist() == pytest.approx(sum(wanted, []))
    alike = normalised(advantages, torch.tensor([0, 2, 1]), 3)
    assert alike[[0, 2]].square().mean(1).tolist() == pytest.approx([1, 1]) and alike[1].tolist() == [0, 0, 0]
    together = normalised(advantages, torch.tensor([0, 1, 0]), 2)
    assert together[[0, 2]].square().mean().item() == pytest.approx(1)
    assert torch.allclose(together[0] / together[2, 1], advantages[0] / advantages[2, 1])


# -- budgets
def test_a_bracket_holds_the_budget():
    asked = []

    def plans_at(penalties):
        """20 prompts of 10 blocks; a prompt leaves out block j from the penalty j + its number / 20 - 3 on."""
        asked.append(penalties.tolist())
        out = torch.arange(10) + torch.arange(20).unsqueeze(1) / 20 - 3
        return (penalties.view(-1, 1, 1) < out).to(torch.int8)

    budgets = torch.tensor([0.95, 0.5, 0.123, 1.5], dtype=torch.float64)
    found = bracket(plans_at, budgets, torch.tensor([0.0, 0.0, 40.0, 0.0], dtype=torch.float64))
    assert found.plans.shape == (4, 2, 20, 10) and len(asked) < 22
    for k in range(4):
        assert torch.equal(found.plans[k, 0], plans_at(found.penalties[k, :1])[0])
        assert torch.equal(found.plans[k, 1], plans_at(found.penalties[k, 1:])[0])
    more, less = found.shares.T
    assert (more[:3] >= budgets[:3]).all() and (less[:3] <= budgets[:3]).all() and (more - less).max() <= 0.03
    assert found.at_budget(found.shares)[:3].tolist() == pytest.approx(budgets[:3].tolist())
    assert found.at_budget(found.shares)[3].item() == 1  # as near as may be
    values = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    expected = [(b - lo) / (m - lo) if m > lo else 0.5 for b, m, lo in zip(budgets, more, less, strict=True)]
    assert found.at_budget(values).tolist() == pytest.approx([min(max(float(e), 0), 1) for e in expected])


def test_a_bracket_around_a_jump():
    """All prompts change at once: half of the one, half of the other."""
    found = bracket(
        lambda penalties: (penalties.view(-1, 1, 1) < 0.7).expand(-1, 4, 6).to(torch.int8),
        torch.tensor([0.5, 0.9], dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
    )
    assert found.shares.tolist() == [[1, 0], [1, 0]]
    assert found.weights.flatten().tolist() == pytest.approx([0.5, 0.5, 0.9, 0.1])
    low, high = found.penalties.T
    assert (low < 0.7).all() and (high >= 0.7).all() and (high - low).max() < 0.01
