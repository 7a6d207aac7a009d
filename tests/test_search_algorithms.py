"""The searches by ask and tell: budget, repeatability, early stop, refusals; and the tree's branching and batches."""

import math
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from landscapes import LANDSCAPES, LAYERS, Landscape, run

from drllm_fast.search.paths import decode, dense_path, edits, visits
from drllm_fast.search.policy_gradient import project
from drllm_fast.search.searcher import METHODS, Outcome, make_searcher
from drllm_fast.search.unit import SearchConfig

FLAT = Landscape(lambda path: 0.0, dense_path(LAYERS))
OPEN = SearchConfig(simulations=200, early_stop=False)


def search_of(method="mcts", dense=(0.0, False), **changes):
    return make_searcher(SearchConfig(method=method, **changes), LAYERS, Outcome(*dense), seed=0)


def edited(path):
    return sum(times != 1 for times in path)


# -- every method -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
@given(
    seed=st.integers(0, 9999),
    num_layers=st.integers(1, 12),
    simulations=st.integers(0, 40),
    batch=st.integers(1, 9),
    max_length=st.sampled_from([1.0, 1.1, 1.3, 2.0]),
    landscape=st.sampled_from(["unit", "binary", "wide"]),
    prior=st.sampled_from([None, 0.0, 2.0]),
)
@settings(max_examples=40, deadline=None)
def test_what_holds_for_every_search(method, seed, num_layers, simulations, batch, max_length, landscape, prior):
    def value(path):
        level = hash((seed, path)) % 1000 / 1000  # tuples of integers hash alike in every process
        return {"unit": level, "binary": float(level > 0.7), "wide": math.tan(level) * 1e9}[landscape]

    weights = None if prior is None else [(prior, 1.0)] * num_layers
    config = SearchConfig(
        method=method,
        simulations=simulations,
        max_length=max_length,
        early_stop=False,
        prior="none" if prior is None else "cka",
    )
    scape = Landscape(value, dense_path(num_layers))
    search, asked = run(scape, config, seed, batch, num_layers, weights)
    assert len(asked) == len(set(asked)) <= simulations
    assert dense_path(num_layers) not in asked
    assert all(len(path) == num_layers and set(path) <= {0, 1, 2} for path in asked)
    assert all(visits(path) <= max_length * num_layers for path in asked)
    assert search.done and search.ask(batch) == []
    assert run(scape, config, seed, batch, num_layers, weights)[1] == asked


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides(method):
    scape, config = LANDSCAPES["additive"](1), replace(OPEN, method=method, simulations=30)
    assert run(scape, config, 1)[1] != run(scape, config, 2)[1]


@pytest.mark.parametrize("method", ["mcts", "random", "beam", "policy-gradient", "spread"])
def test_all_simulations_are_used(method):
    _, asked = run(LANDSCAPES["additive"](1), replace(OPEN, method=method, simulations=60), 1)
    assert len(asked) == 60


@pytest.mark.parametrize("method", METHODS)
def test_tells_in_any_order_and_asks_that_wait(method):
    search = search_of(method, simulations=12)
    first = search.ask(5)
    second = search.ask(5)
    assert not set(first) & set(second) and not search.done
    for path in reversed(first + second):
        search.tell(path, Outcome(-float(visits(path)), False))
    last = search.ask(5)
    assert len(first + second + last) <= 12
    for path in last:
        assert not search.done
        search.tell(path, Outcome(0.0, False))
    while search.ask(1):
        pass
    assert search.done or search.pending


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dense_correct", [False, True])
def test_early_stop(method, dense_correct):
    search = search_of(method, dense=(float(dense_correct), dense_correct), simulations=300)
    told, ended = [], False
    while not ended:
        for path in search.ask(4) or pytest.fail("it never stopped"):
            assert not search.done or ended
            search.tell(path, Outcome(1.0, len(told) >= 6))
            told.append(path)
            if len(told) > 6 and (not dense_correct or LAYERS - visits(path) >= 2):
                ended = True
            assert search.done == ended
    assert search.ask(4) == []


@pytest.mark.parametrize("saved", [1, 2])
def test_a_saving_of_one_visit_stops_nothing(saved):
    search, tried = search_of("random", dense=(1.0, True), simulations=100), []
    while not search.done:
        (path,) = search.ask(1)
        tried.append(LAYERS - visits(path))
        search.tell(path, Outcome(1.0, tried[-1] == saved))
    assert saved in tried and (len(tried) == 100) == (saved == 1)


def test_without_early_stop_it_goes_on():
    search = search_of(simulations=2, early_stop=False)
    for left in (False, True):
        (path,) = search.ask(1)
        search.tell(path, Outcome(1.0, True))
        assert search.done == left


def test_the_largest_length_is_reached():
    """1.15 times 20 is less than 23 in floating point."""
    weights = [(0.0, 1.0)] * 20
    config = SearchConfig(method="chain", simulations=20, early_stop=False, max_length=1.15, prior="cka")
    _, asked = run(FLAT, config, 0, num_layers=20, prior=weights)
    assert max(map(visits, asked)) == 23


def test_no_simulations():
    search = search_of(simulations=0)
    assert search.done and search.ask(4) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_prior_is_followed(method):
    """Blocks of weight 0 are left alone as long as there are others."""
    weights = [(1.0, 0.0) if block % 3 == 0 else (0.0, 0.0) for block in range(LAYERS)]
    config = SearchConfig(method=method, simulations=5, prior="cka")
    search = make_searcher(config, LAYERS, Outcome(0.0, False), 3, weights)
    changed = {(block, times) for path in search.ask(5) for block, times in enumerate(path) if times != 1}
    assert changed <= {(block, 0) for block in range(0, LAYERS, 3)}


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "annealing"}, "method must be one of mcts, chain, random, beam, policy-gradient, spread, got"),
        ({"simulations": -1}, "simulations must be an integer of 0 or more, got -1"),
        ({"simulations": 2.5}, "got 2.5"),
        ({"simulations": True}, "got True"),
        ({"exploration": -0.1}, "exploration must be a finite number, 0 or more"),
        ({"exploration": math.nan}, "got nan"),
        ({"length_penalty": math.inf}, "length_penalty"),
        ({"random_child": 1.1}, "random_child must be a finite number, between 0 and 1, got 1.1"),
        ({"max_length": 0.9}, "max_length must be a finite number, 1 or more"),
        ({"max_length": "2"}, "got '2'"),
        ({"options": {"width": 3}}, "method 'mcts' has no option 'width'; its options are: widening"),
        ({"options": {"widening": -1}}, "option 'widening' of method 'mcts' must be 0 or more, got -1"),
        ({"options": {"widening": "1"}}, "must be of type float, got '1'"),
        ({"options": {"widening": math.nan}}, "got nan"),
        ({"options": {"learn_order": 1}}, "must be of type bool, got 1"),
        ({"method": "beam", "options": {"width": 0}}, "'width' of method 'beam' must be 1 or more, got 0"),
        ({"method": "beam", "options": {"depth": 2.0}}, "type int, got 2.0"),
        ({"method": "beam", "options": {"depth": True}}, "type int, got True"),
        ({"method": "random", "options": {"edits": 0}}, "'edits' of method 'random' must be 1 or more"),
        ({"method": "spread", "options": {"skips": 0}}, "'skips' of method 'spread' must be 1 or more, got 0"),
        ({"method": "spread", "options": {"repeats": -1}}, "'repeats' of method 'spread' must be 0 or more, got -1"),
        ({"method": "spread", "options": {"sharpness": -0.5}}, "'sharpness' of method 'spread' must be 0.0 or more"),
        ({"method": "spread", "options": {"runs": -0.1}}, "'runs' of method 'spread' must be 0.0 or more"),
        ({"method": "policy-gradient", "options": {"budget": 0}}, "'budget' must be above 0 and up to 2"),
        ({"method": "policy-gradient", "options": {"edited": 1.0}}, "'edited' must be between 0 and 1"),
        ({"method": "policy-gradient", "options": {"learning_rate": -1.0}}, "'learning_rate'"),
        ({"prior": "cka"}, "config.prior is 'cka', but no weights were given"),
        ({"num_layers": 0}, "num_layers must be an integer of 1 or more, got 0"),
        ({"dense": (math.inf, False)}, "reward of the dense path must be a finite number, got inf"),
        ({"prior": "cka", "weights": [(1.0, 1.0)] * (LAYERS - 1)}, "for each of 30 blocks"),
        ({"prior": "cka", "weights": [(1.0,)] * LAYERS}, "a pair"),
        ({"prior": "cka", "weights": [(1.0, -1.0)] * LAYERS}, "a weight of the prior"),
        ({"prior": "none", "weights": [(1.0, 1.0)] * LAYERS}, "'none', but weights were given"),
    ],
)
def test_refusals(changes, message):
    changes = dict(changes)
    dense, num_layers = changes.pop("dense", (0.0, False)), changes.pop("num_layers", LAYERS)
    weights = changes.pop("weights", None)
    with pytest.raises(ValueError) as error:
        make_searcher(replace(SearchConfig(), **changes), num_layers, Outcome(*dense), 0, weights)
    assert message in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_refused_tells(method):
    search = search_of(method)
    with pytest.raises(ValueError, match="0 or more, got -1"):
        search.ask(-1)
    (path,) = search.ask(1)
    with pytest.raises(ValueError, match="must be a finite number, got nan"):
        search.tell(path, Outcome(math.nan, False))
    search.tell(path, Outcome(1.0, False))
    for known in (path, dense_path(LAYERS), decode("01" * 15)):
        with pytest.raises(ValueError, match="not one that was asked"):
            search.tell(known, Outcome(1.0, False))


# -- the tree ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LANDSCAPES)
@pytest.mark.parametrize("learn_order", [False, True])
def test_the_tree_branches_and_grows_deep(name, learn_order):
    config = replace(OPEN, options={"learn_order": learn_order})
    search, asked = run(LANDSCAPES[name](1), config, 1)
    assert len(asked) == 200
    assert 5 <= len(search.root.children) <= 10  # ceil(0.7 sqrt(201))
    assert max(map(edited, asked)) >= 5
    branching = [node for node in search.nodes.values() if len(node.children) > 1]
    assert len(branching) >= 10


def test_widening_follows_its_formula():
    search, _ = run(LANDSCAPES["additive"](1), OPEN, 1, batch=1)
    for node in search.nodes.values():
        assert len(node.children) <= math.ceil(0.7 * math.sqrt(node.visits))
    assert len(search.root.children) == math.ceil(0.7 * math.sqrt(search.root.visits - 1))
    narrow, _ = run(LANDSCAPES["additive"](1), replace(OPEN, simulations=15, options={"widening": 0}), 1, batch=1)
    assert all(len(node.children) <= 1 for node in narrow.nodes.values())


def test_visits_add_up():
    search, asked = run(LANDSCAPES["noisy"](2), OPEN, 2)
    assert search.root.visits == 1 + len(asked)
    assert search.root.total == pytest.approx(sum(outcome.reward for outcome in search.told.values()))
    assert all(node.waiting == 0 for node in search.nodes.values())
    assert {path for path, node in search.nodes.items() if node.visits} == set(search.told)


def test_the_ucb():
    search = search_of(dense=(0.0, False))
    for path, reward in zip(search.ask(3), (1.0, 0.0, 1.0), strict=True):
        search.tell(path, Outcome(reward, False))
    root, children = search.root, search.root.children
    children[0].visits, children[0].waiting = 2, 3

    def by_hand(child, mean):
        count = child.visits + child.waiting
        explore = 1.8 * math.sqrt(math.log(root.visits) / count)
        return mean * child.visits / count + explore - 3.0 * visits(child.path) / LAYERS

    expected = [by_hand(children[0], 0.5), by_hand(children[1], 0.0), by_hand(children[2], 1.0)]
    assert search._ucb(root, children) == pytest.approx(expected)
    search._count([root], 100.0)  # no longer 0 and 1: from the worst child to the best
    children[0].total = 8.0
    expected = [by_hand(children[0], 1.0), by_hand(children[1], 0.0), by_hand(children[2], 0.25)]
    assert search._ucb(root, children) == pytest.approx(expected)


def test_rewards_of_any_unit_search_alike():
    """Scaling by a power of two and shifting by little loses no bit that decides."""
    scape = LANDSCAPES["needle"](3)
    wide = Landscape(scape.value, scape.best, reward=lambda path: 1024 * scape.value(path) + 4096)
    assert run(scape, OPEN, 3)[1] == run(wide, OPEN, 3)[1]


def test_the_better_half_is_visited_more():
    """Without random children, ordering or a length penalty, UCB alone leads to the child that pays."""
    config = replace(OPEN, random_child=0.0, length_penalty=0.0, options={"learn_order": False})
    search = make_searcher(config, LAYERS, Outcome(0.0, False), 5)
    good = search.root.untried[-1]
    changed = next(block for block, times in enumerate(good) if times != 1)
    while not search.done:
        for path in search.ask(8):
            search.tell(path, Outcome(float(path[changed] == good[changed]), False))
    counts = sorted((child.visits for child in search.root.children), reverse=True)
    assert search.nodes[good].visits == counts[0] > 1.5 * counts[1]


def test_random_children():
    """Where each child is random and gains order nothing, rewards change nothing."""
    scapes = [LANDSCAPES[name](1) for name in ("needle", "exact")]
    for chance, alike in ((0.0, False), (0.1, False), (1.0, True)):
        config = replace(OPEN, random_child=chance, options={"learn_order": False})
        first, second = (run(scape, config, 1)[1] for scape in scapes)
        assert (first == second) == alike
    greedy, some = (run(scapes[0], replace(OPEN, random_child=chance), 1)[1] for chance in (0.0, 0.1))
    assert greedy != some


def test_a_batch_is_diverse():
    """Once the tree has grown, the walks of a batch part at the root: virtual loss turns each away from the last."""
    search = search_of(simulations=200, early_stop=False, random_child=0.0)
    scape = LANDSCAPES["additive"](4)
    for _ in range(15):
        for path in search.ask(8):
            search.tell(path, scape.evaluate(path))
    asked = search.ask(8)
    walks = [search._walks[path] for path in asked]
    assert len(set(asked)) == 8
    assert len({walk[1].path for walk in walks}) >= 4
    assert len({walk[-2].path for walk in walks}) >= 4
    assert search.root.waiting == 8
    assert all(walk[-1].waiting == 1 and walk[-1].visits == 0 for walk in walks)


def test_nothing_is_tried_below_an_untold_path():
    search = search_of(simulations=200, early_stop=False)
    asked = search.ask(20)
    assert len(asked) == 20 == len(search.root.children)
    assert not any(node.children for node in search.nodes.values() if node is not search.root)


def test_two_orders_of_edits_share_a_node():
    """All 3 ** 4 - 1 paths of four blocks are reached, each once, though most by several orders."""
    config = replace(OPEN, simulations=1000)
    search, asked = run(Landscape(lambda path: 0.0, ()), config, 1, num_layers=4)
    assert len(asked) == 80 and search.done
    assert len(search.nodes) == 81
    node = search.nodes[(0, 2, 1, 1)]
    parents = [parent for parent in search.nodes.values() if node in parent.children]
    assert {parent.path for parent in parents} == {(0, 1, 1, 1), (1, 2, 1, 1)}
    for path, parent in search.nodes.items():
        assert {child.path for child in parent.children} == set(edits(path))


def test_gains_order_the_edits():
    search = search_of(simulations=200, early_stop=False)
    bad, good = decode("0" + "1" * 29), decode("1" * 29 + "2")
    search.nodes[bad], search.nodes[good] = search._node(bad), search._node(good)
    for path, reward in ((bad, -5.5), (good, 0.25)):
        search.pending[path] = None
        search._walks[path] = [search.root, search.nodes[path]]
        search.root.waiting += 1
        search.nodes[path].waiting += 1
        search.tell(path, Outcome(reward, False))
    order = [search._next_edit(search.root) for _ in range(len(search.root.untried))]
    assert order[0] == good
    assert {path[0] for path in order[-2:]} == {0}  # block 0 skipped, alone and with its neighbour


# -- the others -------------------------------------------------------------------------------------------------------
def test_the_chain_does_not_branch():
    search, asked = run(FLAT, replace(OPEN, method="chain"), 1)
    assert len(asked) <= LAYERS and search.done
    for path, after in zip([dense_path(LAYERS), *asked], asked, strict=False):
        assert after in edits(path)
    assert edited(asked[-1]) == LAYERS
    rewarded = LANDSCAPES["additive"](1)
    assert run(rewarded, replace(OPEN, method="chain"), 1)[1] == asked  # rewards change nothing
    _, restarted = run(FLAT, replace(OPEN, method="chain", options={"restart": True}), 1)
    assert len(restarted) == 200 and restarted[: len(asked)] == asked


def test_random_search_draws_numbers_of_edits_evenly():
    _, asked = run(FLAT, replace(OPEN, method="random", simulations=600, options={"edits": 3}), 1)
    one_edit = set(edits(dense_path(LAYERS)))
    assert len(one_edit & set(asked)) > 0.75 * len(one_edit)  # 89 of them, about 200 draws
    assert max(map(edited, asked)) == 6
    assert sum(map(edited, asked)) / len(asked) == pytest.approx(3, abs=0.4)


def spread(options, weights=None, simulations=600, num_layers=LAYERS, **changes):
    prior = "none" if weights is None else "kl"
    config = replace(OPEN, method="spread", simulations=simulations, options=options, prior=prior, **changes)
    return run(FLAT, config, 1, num_layers=num_layers, prior=weights)[1]


def test_spread_paths_are_spread_evenly():
    """Over numbers of skips and of repeats, and over blocks."""
    asked = spread({"skips": 6, "repeats": 2, "runs": 0.0}, simulations=1500)
    skips, repeats = [path.count(0) for path in asked], [path.count(2) for path in asked]
    # One skip has 30 paths only, of which few are left after a while.
    shares = [skips.count(m) / len(asked) for m in range(2, 7)]
    assert max(skips) == 6 and min(skips) == 1 and all(abs(share - 0.18) < 0.04 for share in shares)
    assert [repeats.count(m) / len(asked) for m in range(4)] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=0.04)
    of_block = [sum(path[block] == 0 for path in asked) / sum(skips) for block in range(LAYERS)]
    assert max(abs(share - 1 / LAYERS) for share in of_block) < 0.012


def test_spread_paths_follow_the_prior():
    """A block of weight 3 is drawn three times as often as one of weight 1; sharpness 2 makes it nine, 0 once."""
    weights = [(3.0, 1.0) if block < 15 else (1.0, 3.0) for block in range(LAYERS)]
    for sharpness, ratio in ((0.0, 1), (1.0, 3), (2.0, 9)):
        options = {"skips": 2, "repeats": 1, "sharpness": sharpness, "runs": 0.0}
        asked = spread(options, weights, simulations=1000)
        two = [path for path in asked if path.count(0) == 2]
        first = sum(path[block] == 0 for path in two for block in range(15))
        second = sum(path[block] == 2 for path in asked for block in range(15, LAYERS))
        others = 2 * len(two) - first, sum(path.count(2) for path in asked) - second
        expected = ratio / (1 + ratio)
        assert first / (first + others[0]) == pytest.approx(expected, abs=0.06)
        assert second / (second + others[1]) == pytest.approx(expected, abs=0.06)
    only = [(1.0, 1.0) if block == 4 else (0.0, 0.0) for block in range(LAYERS)]
    assert spread({"skips": 3}, only) == [(1,) * 4 + (0,) + (1,) * 25]
    nothing = spread({"skips": 3}, [(0.0, 0.0)] * LAYERS)
    assert sorted(nothing) == sorted(path for path in edits(dense_path(LAYERS)) if 2 not in path and path.count(0) == 1)


def stretches(path):
    """Lengths of the runs of skipped blocks."""
    return [len(run) for run in "".join("s" if times == 0 else "-" for times in path).split("-") if run]


def test_spread_paths_with_stretches():
    """Without a prior a stretch goes on until the skips are used up, the last block, or one that is left out already;
    with one it ends at a block of weight 0."""
    whole = spread({"skips": 5, "repeats": 0, "runs": 1.0}, simulations=110)
    assert sum(len(stretches(path)) == 1 for path in whole) > 0.8 * len(whole)
    assert {sum(stretches(path)) for path in whole} == {1, 2, 3, 4, 5}
    assert all(path[-1] == 0 for path in whole if len(stretches(path)) > 1)  # only the end cuts one
    apart = spread({"skips": 5, "repeats": 0, "runs": 0.0}, simulations=110)
    assert sum(len(stretches(path)) == 1 for path in apart) < 0.5 * len(apart)
    weights = [(float(block % 3 > 0), 1.0) for block in range(LAYERS)]
    pairs = spread({"skips": 6, "runs": 1.0}, weights, simulations=200)
    assert {length for path in pairs for length in stretches(path)} == {1, 2}
    assert not any(path[block] == 0 for path in pairs for block in range(0, LAYERS, 3))


def test_spread_keeps_a_block_and_ends_when_all_is_known():
    asked = spread({"skips": 9, "repeats": 0}, num_layers=4)
    assert sorted(asked) == sorted(path for path in product((0, 1), repeat=4) if 0 < sum(path) < 4)
    short = spread({"skips": 1, "repeats": 3}, num_layers=6, max_length=1.0)
    assert max(map(visits, short)) == 6 and len(short) == 6 + 6 * 5


def test_the_beam_edits_the_best():
    scape = LANDSCAPES["additive"](1)
    config = replace(OPEN, method="beam", simulations=40, options={"width": 2, "depth": 4})
    _, asked = run(scape, config, 1)
    beam = [dense_path(LAYERS)]
    for start in range(0, 40, 10):
        level = asked[start : start + 10]
        assert all(any(path in edits(parent) for parent in beam) for path in level)
        beam = sorted(beam + level, key=scape.value, reverse=True)[:2]
    search, asked = run(FLAT, replace(config, simulations=20), 1)
    shortest = sorted(map(visits, [dense_path(LAYERS), *asked[:15]]))[:2]  # before the last level
    assert sorted(map(visits, search._beam)) == shortest  # of equal rewards, the shorter


@given(st.lists(st.lists(st.floats(-9, 9), min_size=3, max_size=3), min_size=1, max_size=8), st.floats(0.05, 2))
def test_the_projection(logits, budget):
    p = project(logits, budget)
    mean = sum(row[1] + 2 * row[2] for row in p)
    assert mean <= budget * len(logits) * (1 + 1e-12)
    assert all(sum(row) == pytest.approx(1) for row in p)
    free = project(logits, 2.0)
    if sum(row[1] + 2 * row[2] for row in free) <= budget * len(logits):
        assert p == free
    else:
        assert mean == pytest.approx(budget * len(logits), rel=1e-6)
        tilts = [math.log(a[k] / b[k] * b[0] / a[0]) / k for a, b in zip(p, free, strict=True) for k in (1, 2)]
        assert tilts == pytest.approx([tilts[0]] * len(tilts), rel=1e-3, abs=1e-3)  # one mu for all


def test_the_policy_learns():
    """Probabilities move to what pays, and a budget holds at every step."""
    scape = LANDSCAPES["additive"](1)
    config = replace(OPEN, method="policy-gradient", options={"budget": 0.9})
    search, asked = run(scape, config, 1)
    good = [(block, times) for block, times in enumerate(scape.best) if times != 1]
    assert sum(search.probabilities[block][times] for block, times in good) / len(good) > 0.4  # 0.09 at first
    assert sum(row[1] + 2 * row[2] for row in search.probabilities) <= 0.9 * LAYERS + 1e-9
    assert sum(map(visits, asked)) / len(asked) < 0.92 * LAYERS
