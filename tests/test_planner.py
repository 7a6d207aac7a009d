import itertools
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drllm_fast import ops, planner, planner_reference
from drllm_fast.planner import count_runs, decode_plan, group_paths, grouping_cost, order_rows

compiled = pytest.mark.skipif(ops.EXTENSION_ERROR is not None, reason="nothing is compiled here")


@pytest.fixture(params=["reference", pytest.param("compiled", marks=compiled)])
def implementation(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(planner, "_implementation", planner_reference)
    return request.param


def table(rows, layers):
    return st.lists(st.lists(st.integers(0, 2), min_size=layers, max_size=layers), min_size=rows, max_size=rows)


# Larger ones come from a seed, which is quick to draw and to shrink: like is how much paths have in common.
seeds, like = st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.9])
tables = st.tuples(st.integers(1, 9), st.integers(1, 5)).flatmap(lambda shape: table(*shape))
properties = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def some_paths(seed, rows, layers, different=None, like=0.0):
    """Random paths, of which each entry is as in a shared one with probability `like`."""
    rng = np.random.default_rng(seed)
    count = different or rows
    paths = np.where(
        rng.random((count, layers)) < like, rng.integers(0, 3, layers), rng.integers(0, 3, (count, layers))
    )
    return paths[rng.permutation(np.arange(rows) % count)].astype(np.int8)


# -- oracles -------------------------------------------------------------------------------------------------------
def visits_of(path):
    """The visits that a path runs, in order."""
    return {(layer, number) for layer, times in enumerate(path) for number in range(times)}


def runs_of(rows):
    """Maximal runs of active rows, counted one by one."""
    found = 0
    for visit in {v for path in rows for v in visits_of(path)}:
        before = False
        for path in rows:
            active = visit in visits_of(path)
            found += active and not before
            before = active
    return found


def cost_of(rows, batches, visit_cost, row_cost):
    total = 0
    for batch in batches:
        for visit in {v for row in batch for v in visits_of(rows[row])}:
            total += visit_cost[visit] + row_cost[visit] * sum(visit in visits_of(rows[row]) for row in batch)
    return total


def partitions(items, most):
    """All partitions into sets of at most `most`."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for size in range(min(most, len(items))):
        for others in itertools.combinations(rest, size):
            for more in partitions([item for item in rest if item not in others], most):
                yield [(first, *others), *more]


def cheapest(rows, most, visit_cost):
    known = {}

    def cost(batch):
        if batch not in known:
            known[batch] = sum(visit_cost[v] for v in {v for row in batch for v in visits_of(rows[row])})
        return known[batch]

    return min(sum(map(cost, partition)) for partition in partitions(list(range(len(rows))), most))


# -- decode_plan ---------------------------------------------------------------------------------------------------
@properties
@given(rows=tables)
def test_decode_plan(implementation, rows):
    decoded, batch = decode_plan(rows), len(rows)
    gathers = 0
    assert len(decoded.schedule) == len(decoded.kinds) == len(decoded.ranks) == len(rows[0])
    for layer, number in itertools.product(range(len(rows[0])), (0, 1)):
        expected = [row for row in range(batch) if (layer, number) in visits_of(rows[row])]
        active, kind = decoded.schedule[layer][number], decoded.kinds[layer][number]
        assert active == tuple(expected)
        assert decoded.ranks[layer][number] == tuple(expected.index(r) if r in expected else -1 for r in range(batch))
        if not expected:
            assert kind == "none"
        elif expected == list(range(batch)):
            assert kind == "all"
        elif expected == list(range(expected[0], expected[-1] + 1)):
            assert kind == "range"
        else:
            assert kind == "scattered"
            gathers += 1
    assert decoded.gathers == gathers
    assert decoded.visits == tuple(len(visits_of(path)) for path in rows)


def test_decoded_for_the_executor(implementation):
    """Lists of pairs of tuples of ints; visits of the same rows have the same tuple."""
    decoded = decode_plan([[1, 1, 2, 0, 1], [1, 0, 1, 0, 2], [1, 1, 2, 1, 1], [2, 0, 1, 0, 2]])
    assert decoded.kinds == [("all", "range"), ("scattered", "none"), ("all", "scattered"), ("range", "none")] + [
        ("all", "scattered")
    ]
    assert decoded.visits == (5, 4, 6, 5) and decoded.gathers == 3
    assert type(decoded.schedule) is list and type(decoded.visits) is tuple
    for field in (decoded.schedule, decoded.ranks):
        pairs = [*itertools.chain(*field)]
        assert all(type(rows) is tuple and type(row) is int for rows in pairs for row in rows)
        assert all(a is b for a in pairs for b in pairs if a == b)


@pytest.mark.parametrize(("batch", "layers"), [(0, 3), (3, 0), (1, 1), (200, 1), (1, 200), (70, 200)])
def test_shapes(implementation, batch, layers):
    paths = some_paths(3, batch, layers)
    decoded = decode_plan(paths)
    assert decoded.schedule == [
        (tuple(np.flatnonzero(column >= 1)), tuple(np.flatnonzero(column == 2))) for column in paths.T
    ]
    assert sorted(order_rows(paths)) == list(range(batch))
    assert sorted(itertools.chain(*group_paths(paths, 7))) == list(range(batch))
    if not batch:
        assert decoded == planner.DecodePlan([((), ())] * 3, [("none", "none")] * 3, [((), ())] * 3, (), 0)
        assert order_rows(paths) == group_paths(paths, 7) == [] and grouping_cost(paths, []) == count_runs(paths) == 0


def test_what_may_be_given(implementation):
    rows = [[0, 1, 2], [2, 0, 1]]
    wide = np.array(rows, dtype=np.int64)
    fortran, strided = np.asfortranarray(wide.astype(np.int8)), np.repeat(wide, 2, axis=1)[:, ::2]
    for same in (
        wide,
        fortran,
        strided,
        wide.astype(np.uint8),
        torch.tensor(rows),
        torch.tensor(rows).T.contiguous().T,
    ):
        assert decode_plan(same) == decode_plan(rows)
        assert order_rows(same) == order_rows(rows)
        assert group_paths(same, 1) == [[0], [1]]
    assert decode_plan([]).schedule == [] and group_paths([], 1) == []


# -- order_rows ----------------------------------------------------------------------------------------------------
@properties
@given(rows=tables)
def test_count_runs(rows):
    assert count_runs(rows) == runs_of(rows)


@pytest.mark.parametrize("seed", range(60))
def test_best_order(implementation, seed):
    rows = some_paths(seed, rows=seed % 6 + 1, layers=seed % 5 + 1, different=seed % 4 + 1).tolist()
    order = order_rows(rows)
    best = min(itertools.permutations(range(len(rows))), key=lambda tour: runs_of([rows[r] for r in tour]))
    assert sorted(order) == sorted(best)
    assert runs_of([rows[r] for r in order]) == runs_of([rows[r] for r in best])


@properties
@given(seed=seeds, like=like, layers=st.integers(1, 3) | st.just(40), batch=st.integers(1, 40), ordered=st.booleans())
def test_an_order_is_never_worse(implementation, seed, like, layers, batch, ordered):
    rows = some_paths(seed, batch, layers, like=like).tolist()
    if ordered:
        rows.sort()
    order = order_rows(rows)
    assert sorted(order) == list(range(batch))
    assert count_runs([rows[r] for r in order]) <= count_runs(rows)
    number = {}
    kinds = [number.setdefault(tuple(rows[r]), len(number)) for r in order]
    assert len([*itertools.groupby(kinds)]) == len(number), "equal paths are apart"
    assert order == order_rows(rows)


@compiled
@pytest.mark.parametrize("seed", range(12))
def test_no_small_change_of_an_order_helps(seed):
    """No part turned round, and no part of up to three rows moved, either way round."""
    paths = some_paths(seed, 20, 10 + 3 * seed, like=0.5)
    paths = paths[order_rows(paths)]
    best, places = count_runs(paths), list(range(20))
    for i, j in itertools.combinations(range(21), 2):
        assert count_runs(paths[places[:i] + places[i:j][::-1] + places[j:]]) >= best
        if j - i <= 3:
            part, rest = places[i:j], places[:i] + places[j:]
            for at in range(len(rest) + 1):
                for moved in (part, part[::-1]):
                    assert count_runs(paths[rest[:at] + moved + rest[at:]]) >= best


@compiled
def test_order_of_many():
    """A chain of paths, of which neighbours differ in one visit, is found again."""
    chain = np.tril(np.ones((60, 59), dtype=np.int8), -1)
    shuffled = chain[np.random.default_rng(0).permutation(60)]
    assert count_runs(shuffled[order_rows(shuffled)]) == count_runs(chain) == 59
    for seed in range(5):
        paths = some_paths(seed, 80, 24, like=0.8)
        here = count_runs(paths[order_rows(paths)])
        assert here < count_runs(paths[planner_reference.order_rows(paths)]) < 0.95 * count_runs(paths)


# -- group_paths ---------------------------------------------------------------------------------------------------
def small_case(seed):
    """rows, max_batch, visit_cost: random, structured, with equal rows; costs that are all one, or different."""
    rng = random.Random(seed)
    count, layers = rng.randint(1, 7), rng.randint(1, 5)
    style = rng.choice(["random", "clusters", "mostly one"])
    weights = [1, 8, 1] if style == "mostly one" else [1, 1, 1]
    rows = [rng.choices(range(3), weights, k=layers) for _ in range(count)]
    if style == "clusters":
        rows = [list(rows[rng.randrange(min(3, count))]) for _ in range(count)]
        for row in rows:
            if rng.random() < 0.4:
                row[rng.randrange(layers)] = rng.randrange(3)
    costs = (
        np.ones((layers, 2)) if rng.random() < 0.5 else np.array([[rng.random(), rng.random()] for _ in range(layers)])
    )
    return rows, rng.randint(1, 4), costs


CASES = range(600)


def test_groups_are_optimal(implementation):
    for seed in CASES:
        rows, most, costs = small_case(seed)
        batches = group_paths(rows, most, visit_cost=costs)
        assert sorted(itertools.chain(*batches)) == list(range(len(rows)))
        assert max(map(len, batches)) <= most
        found = cost_of(rows, batches, costs, np.zeros_like(costs))
        assert found == pytest.approx(cheapest(rows, most, costs), abs=1e-9), (seed, batches)


@compiled
def test_local_search_is_optimal():
    """The search that many rows need, on rows that few enough are to know what is best."""
    for seed in CASES:
        rows, most, costs = small_case(seed)
        batches = planner._implementation.group_paths(np.array(rows, np.int8), most, costs.ravel().tolist(), 0)
        found = cost_of(rows, batches, costs, np.zeros_like(costs))
        assert found == pytest.approx(cheapest(rows, most, costs), abs=1e-9), (seed, batches)


@compiled
@pytest.mark.parametrize(("counts", "most"), [((4, 3, 5), 4), ((20, 20), 22), ((2, 2, 2, 2, 2), 3), ((1,) * 10, 4)])
def test_equal_rows_are_grouped_exactly(counts, most):
    """Against the reference, which is optimal for the same numbers of rows, and against the local search."""
    paths = np.repeat(some_paths(len(counts), len(counts), 6), counts, axis=0)
    batches = group_paths(paths, most)
    arguments = paths, most, [1.0] * 12
    assert sorted(itertools.chain(*batches)) == list(range(sum(counts))) and max(map(len, batches)) <= most
    cost = grouping_cost(paths, batches)
    assert cost == grouping_cost(paths, planner_reference.group_paths(*arguments, planner.EXACT_STEPS))
    assert cost <= grouping_cost(paths, planner._implementation.group_paths(*arguments, 0))


@properties
@given(seed=seeds, like=like, batch=st.integers(0, 60), layers=st.integers(1, 4) | st.just(70), most=st.integers(1, 70))
def test_groups(implementation, seed, like, batch, layers, most):
    """A partition, not too large, in order; no worse than rows as they come or sorted; the same each time."""
    rows = some_paths(seed, batch, layers, like=like).tolist() or np.zeros((0, layers), dtype=int)
    batches = group_paths(rows, most)
    assert sorted(itertools.chain(*batches)) == list(range(batch))
    assert all(1 <= len(some) <= most for some in batches)
    assert batches == sorted(sorted(some) for some in batches)
    assert len(batches) < 2 or sum(sorted(map(len, batches))[:2]) > most
    cost = grouping_cost(rows, batches)
    for order in (list(range(batch)), sorted(range(batch), key=lambda row: rows[row])):
        assert cost <= grouping_cost(rows, [order[i : i + most] for i in range(0, batch, most)])
    assert batches == group_paths(rows, most) == group_paths(rows, most, row_cost=3)


@properties
@given(data=st.data(), rows=tables, scalar=st.booleans())
def test_grouping_cost(data, rows, scalar):
    """Its formula; and whatever the batches, their rows cost the same."""
    order = data.draw(st.permutations(range(len(rows))))
    cut = data.draw(st.integers(0, len(rows)))
    batches = [order[:cut], order[cut:]]
    numbers = st.integers(0, 9).map(lambda n: n / 4)
    each = (
        numbers
        if scalar
        else st.lists(st.lists(numbers, min_size=2, max_size=2), min_size=len(rows[0]), max_size=len(rows[0]))
    )
    visit_cost, row_cost = data.draw(each), data.draw(each)
    visits, by_row = (np.broadcast_to(cost, (len(rows[0]), 2)) for cost in (visit_cost, row_cost))
    cost = grouping_cost(rows, batches, visit_cost=visit_cost, row_cost=row_cost)
    assert cost == cost_of(rows, batches, visits, by_row)
    constant = sum(by_row[v] for path in rows for v in visits_of(path))
    assert cost - grouping_cost(rows, batches, visit_cost=visit_cost) == pytest.approx(constant)


@pytest.mark.parametrize("unit", [1, 1e-300, 1.7e307])
def test_costs_decide(implementation, unit):
    """Two ways to pair rows, by layer 0 or by layer 1; so few that it is exact, and so many that it is not."""
    for copies in (1, 20):
        kinds = np.repeat([[1, 0], [1, 2], [0, 0], [0, 2]], copies, axis=0)
        for costs, layer in (([[5, 0], [1, 1]], 0), ([[1, 0], [1, 2]], 1)):
            batches = group_paths(kinds, 2 * copies, visit_cost=np.array(costs) * unit)
            assert len(batches) == 2 and all(len(set(kinds[batch, layer])) == 1 for batch in batches)


@compiled
@pytest.mark.parametrize("layers", [32, 200])
def test_groups_that_are_hidden_in_many_rows(layers):
    """50 kinds of rows that share no visit with another kind's first one, 40 of each, shuffled: each its own batch."""
    kinds = np.zeros((50, layers), dtype=np.int8)
    for kind in range(50):
        kinds[kind, np.random.default_rng(kind).choice(layers, 5, replace=False)] = 1 + kind % 2
    assert len(np.unique(kinds, axis=0)) == 50
    order = np.random.default_rng(0).permutation(np.arange(2000) % 50)
    batches = group_paths(kinds[order], 40)
    assert sorted(len({order[row] for row in batch}) for batch in batches) == [1] * 50


@compiled
@pytest.mark.parametrize("most", [1, 32, 64])
@pytest.mark.parametrize("different", [1, 50, 2_000, 10_000])
def test_ten_thousand_sequences_take_no_time(different, most):
    rng = np.random.default_rng(different)
    paths = rng.choice(3, p=[0.1, 0.85, 0.05], size=(different, 32)).astype(np.int8)
    paths = paths[rng.permutation(np.arange(10_000) % different)]
    start = time.thread_time()  # not what other processes take
    batches = group_paths(paths, most)
    seconds = time.thread_time() - start
    assert sorted(itertools.chain(*batches)) == list(range(10_000)) and max(map(len, batches)) <= most
    arrival = [list(range(i, min(i + most, 10_000))) for i in range(0, 10_000, most)]
    cost, as_they_come = grouping_cost(paths, batches), grouping_cost(paths, arrival)
    assert cost == as_they_come if 1 in (most, different) else cost < 0.75 * as_they_come
    assert seconds < 1.5


# -- threads -------------------------------------------------------------------------------------------------------
@compiled
@pytest.mark.parametrize("function", [order_rows, lambda paths: group_paths(paths, 24)], ids=["order", "group"])
def test_the_gil_is_released(function):
    """Another thread goes on while a long call runs. On a busy machine it may have to wait, but not every time."""
    paths = some_paths(0, 4_000, 64)

    def longest_wait():
        """Of this thread, as a share of the call."""
        start = last = time.perf_counter()
        longest = 0.0
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(function, paths)
            while not call.done():
                time.sleep(0.0005)
                now = time.perf_counter()
                last, longest = now, max(longest, now - last)
        assert now - start > 0.05, "too short to see anything"
        return longest / (now - start)

    assert any(longest_wait() < 0.5 for _ in range(3))


def test_threads_agree(implementation):
    plans = [some_paths(seed, 30, 12, like=0.6) for seed in range(8)]

    def everything(plan):
        return decode_plan(plan), order_rows(plan), group_paths(plan, 4)

    expected = [everything(plan) for plan in plans]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(everything, plans * 3)) == expected * 3


# -- refusals ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("function", [decode_plan, order_rows, count_runs, lambda p: group_paths(p, 2)])
@pytest.mark.parametrize(
    ("paths", "error", "message"),
    [
        ([[0, 3]], ValueError, "values from 0 to 3"),
        ([[-1, 1]], ValueError, "values from -1 to 1"),
        (np.array([[256, 1]]), ValueError, "values from 1 to 256"),
        ([1, 0, 2], ValueError, r"shape \[3\]"),
        ([[[1]]], ValueError, r"shape \[1, 1, 1\]"),
        ([[1, 0], [1]], ValueError, "not a table of paths"),
        ([[1.0, 0.0]], TypeError, "float64"),
        (torch.ones(1, 2, dtype=torch.bfloat16), TypeError, "not a table of paths"),
        (np.ones((1, 2), dtype=bool), TypeError, "bool"),
        ([["1"]], TypeError, "<U1"),
        (None, TypeError, "object"),
    ],
)
def test_what_is_no_plan(function, paths, error, message):
    with pytest.raises(error, match=message) as raised:
        function(paths)
    assert "0 skip, 1 execute, 2 repeat" in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_batch": 0}, ValueError, "max_batch must be at least 1, got 0"),
        ({"max_batch": -3}, ValueError, "got -3"),
        ({"max_batch": 2.0}, TypeError, "max_batch must be an integer, got float"),
        ({"max_batch": True}, TypeError, "got bool"),
        ({"visit_cost": -1}, ValueError, "visit_cost with values from -1.0 to -1.0"),
        ({"visit_cost": float("nan")}, ValueError, "visit_cost with values from nan"),
        ({"row_cost": [[1, 2], [float("inf"), 0]]}, ValueError, "row_cost with values from 0.0 to inf"),
        ({"visit_cost": [1, 2]}, ValueError, r"visit_cost of shape \[2\]; .*\[2, 2\]"),
        ({"row_cost": [[1, 2]]}, ValueError, r"row_cost of shape \[1, 2\]"),
        ({"row_cost": "much"}, TypeError, "row_cost of <U4"),
        ({"visit_cost": True}, TypeError, "visit_cost of bool"),
    ],
)
def test_what_cannot_be_grouped(arguments, error, message):
    with pytest.raises(error, match=message):
        group_paths([[1, 0], [2, 1]], **{"max_batch": 2, **arguments})
    if "max_batch" not in arguments:
        with pytest.raises(error, match=message):
            grouping_cost([[1, 0], [2, 1]], [[0, 1]], **arguments)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([[0, 2]], ValueError, "row 2 is in a batch, but there are only 2 rows"),
        ([[-1]], ValueError, "row -1"),
        ([[0, 1], [0]], ValueError, "row 0 is in the batches twice"),
        ([[0.0]], TypeError, "row numbers, got 0.0"),
        ([[True]], TypeError, "row numbers, got True"),
    ],
)
def test_what_are_no_batches(batches, error, message):
    with pytest.raises(error, match=message):
        grouping_cost([[1, 0], [2, 1]], batches)


def test_a_large_max_batch(implementation):
    assert group_paths([[1], [0], [2]], sys.maxsize * 4) == [[0, 1, 2]]
