"""The searches on synthetic landscapes with a known optimum, at equal numbers of forwards, over fixed seeds.

`python tests/test_search_landscapes.py [simulations] [seeds]` prints the table of all methods.
"""

import sys
from functools import cache
from statistics import mean

import pytest
from landscapes import LANDSCAPES, reached, run

from drllm_fast.search.unit import SearchConfig

ROWS = {
    "mcts": ("mcts", {}),
    "mcts, one at a time": ("mcts", {}),
    "mcts, prior order": ("mcts", {"learn_order": False}),
    "beam": ("beam", {}),
    "policy-gradient": ("policy-gradient", {}),
    "random": ("random", {}),
    "random, 4 edits": ("random", {"edits": 4}),
    "chain": ("chain", {}),
    "chain, restarted": ("chain", {"restart": True}),
}
SEEDS = 20


@cache
def score(row: str, name: str, simulations: int = 200, seeds: int = SEEDS) -> float:
    """Mean over seeds of the best path found: 0 for the dense one, 1 for the best there is."""
    method, options = ROWS[row]
    config = SearchConfig(method=method, simulations=simulations, early_stop=False, options=options)
    batch = 1 if "one at a time" in row else 8
    scapes = [LANDSCAPES[name](seed) for seed in range(seeds)]
    return mean(reached(scape, run(scape, config, seed, batch)[0]) for seed, scape in enumerate(scapes))


@pytest.mark.parametrize("name", LANDSCAPES)
def test_the_optimum_is_one(name):
    for seed in range(SEEDS):
        scape = LANDSCAPES[name](seed)
        best = scape.value(scape.best)
        for block, _ in enumerate(scape.best):
            for times in (0, 1, 2):
                assert scape.value(scape.best[:block] + (times,) + scape.best[block + 1 :]) <= best + 1e-9
        assert scape.score((1,) * len(scape.best)) == 0 and scape.score(scape.best) == 1


@pytest.mark.parametrize("name", LANDSCAPES)
def test_tree_search_beats_the_baselines(name):
    baselines = max(score(row, name) for row in ("random", "random, 4 edits", "chain", "chain, restarted"))
    assert score("mcts", name) > 1.3 * baselines


@pytest.mark.parametrize("name", LANDSCAPES)
def test_beam_search_beats_the_baselines(name):
    assert score("beam", name) > 1.5 * max(score("random", name), score("chain, restarted", name))


@pytest.mark.parametrize("name", [name for name in LANDSCAPES if name != "exact"])
def test_policy_gradient_beats_the_baselines(name):
    """Rewards of 0 and 1 leave it little to follow: there it is about as good as random search."""
    assert score("policy-gradient", name) > 1.5 * max(score("random", name), score("chain, restarted", name))


@pytest.mark.parametrize("name", LANDSCAPES)
def test_tree_search_of_50_simulations(name):
    """The paper's number."""
    baselines = max(score(row, name, 50) for row in ("random", "random, 4 edits", "chain", "chain, restarted"))
    assert score("mcts", name, 50) > baselines


@pytest.mark.parametrize("name", ["additive", "interacting"])
def test_fewer_at_once_search_better(name):
    assert score("mcts, one at a time", name, 50) > 1.1 * score("mcts", name, 50)


if __name__ == "__main__":
    simulations, seeds = (*map(int, sys.argv[1:]), *(200, SEEDS)[len(sys.argv) - 1 :])
    print(f"{simulations} simulations, {seeds} seeds".ljust(28), *(name.rjust(11) for name in LANDSCAPES))
    for row in ROWS:
        print(row.ljust(28), *(f"{score(row, name, simulations, seeds):11.3f}" for name in LANDSCAPES))
