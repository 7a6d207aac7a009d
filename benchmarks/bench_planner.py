"""Planning on the host: batches of 10,000 sequences of 32 layers, the order of a batch, what a forward asks of a plan.

    pytest benchmarks/bench_planner.py -s     # -s shows what the batches cost

independent  every layer of every path is skipped with probability 0.1 and repeated with 0.05
layerwise    each layer has its own probabilities, most of them small, as a trained router's layers do

Costs count the visits that a step of every batch runs. They are compared with batches filled in order of arrival, and
in lexicographic order, and with a bound that no partition goes below, the larger of
    sum over visits v of ceil(rows that run v / max_batch)      each visit needs that many batches
    sum over j of the visits in the (1 + j max_batch)-th longest path      a batch costs what its longest path does
"""

import functools

import numpy as np
import pytest

from drllm_fast import planner, planner_reference
from drllm_fast.planner import count_runs, decode_plan, group_paths, grouping_cost, order_rows

SEQUENCES, LAYERS = 10_000, 32


@functools.cache
def some_paths(kind, rows, different, seed=0):
    rng = np.random.default_rng(seed)
    skip, repeat = (0.1, 0.05) if kind == "independent" else (rng.beta(0.5, 4, LAYERS), rng.beta(0.5, 8, LAYERS))
    draw = rng.random((different, LAYERS))
    paths = np.where(draw < skip, 0, np.where(draw > 1 - repeat, 2, 1)).astype(np.int8)
    return paths[rng.permutation(np.arange(rows) % different)]


def in_turn(order, most):
    return [list(order[i : i + most]) for i in range(0, len(order), most)]


def lower_bound(paths, most):
    each_visit = np.stack([paths >= 1, paths == 2]).sum(axis=1)
    longest_first = np.sort(paths.sum(axis=1))[::-1]
    return max(int((-(-each_visit // most)).sum()), int(longest_first[::most].sum()))


@pytest.mark.parametrize("kind", ["independent", "layerwise"])
@pytest.mark.parametrize("max_batch", [32, 64])
@pytest.mark.parametrize("different", [1, 50, 2_000, 10_000])
def bench_group_paths(benchmark, kind, max_batch, different):
    paths = some_paths(kind, SEQUENCES, different)
    batches = benchmark(group_paths, paths, max_batch)
    assert sorted(row for batch in batches for row in batch) == list(range(SEQUENCES))
    bound, cost = lower_bound(paths, max_batch), grouping_cost(paths, batches)
    arrival = grouping_cost(paths, in_turn(range(SEQUENCES), max_batch))
    alphabetical = grouping_cost(paths, in_turn(np.lexsort(paths.T[::-1]), max_batch))
    assert bound <= cost <= min(arrival, alphabetical)
    benchmark.extra_info.update(cost=cost, arrival=arrival, sorted=alphabetical, bound=bound)
    print(f"\n| {kind} | {different} | {max_batch} | {cost:.0f} ", end="")
    print(f"| {cost / arrival:.3f} | {cost / alphabetical:.3f} | {cost / bound:.3f} |")


@pytest.mark.parametrize("rows", [8, 64, 512])
def bench_order_rows(benchmark, rows):
    plan = some_paths("independent", rows, rows)
    order = benchmark(order_rows, plan)
    assert sorted(order) == list(range(rows))
    before, after = count_runs(plan), count_runs(plan[order])
    benchmark.extra_info.update(runs=after, runs_before=before)
    print(f"\n| order_rows | {rows} | {before} | {after} | {after / before:.3f} |")


@pytest.mark.parametrize("implementation", ["lists", "reference", "planner"])
@pytest.mark.parametrize("rows", [1, 16, 128])
def bench_decode_plan(race, implementation, rows):
    """lists: the rows of each visit alone, as list comprehensions."""
    plan = some_paths("independent", rows, rows)

    def lists():
        columns = plan.T.tolist()
        return [tuple(tuple(r for r, d in enumerate(c) if d >= least) for least in (1, 2)) for c in columns]

    def check(result):
        assert getattr(result, "schedule", result) == expected

    expected = lists()
    race(
        {
            "lists": lists,
            "reference": lambda: planner.DecodePlan(*planner_reference.decode_plan(plan)),
            "planner": lambda: decode_plan(plan),
        },
        check,
    )
