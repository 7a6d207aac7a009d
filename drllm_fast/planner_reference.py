"""What the planner computes, in Python: the specification of csrc/plan*.cpp, and what runs where that is not compiled.

decode_plan gives the same as in C++, and so does order_rows for up to MAX_EXACT different paths; group_paths gives
batches of the same cost up to `exact_steps`. Beyond that both search by simpler rules than in C++ (no local search),
for the same objective. Arguments are those that planner.py has checked: paths int8 [N, L].
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from math import inf, prod

import numpy as np

KINDS = ("none", "all", "range", "scattered")
MAX_EXACT = 10  # different paths that order_rows orders exactly
STARTS = 8


def decode_plan(plan: np.ndarray) -> tuple:
    """The fields of planner.DecodePlan."""
    batch, columns = len(plan), plan.T.tolist()
    known: dict[tuple[int, ...], tuple] = {}

    def visit(column: list[int], number: int) -> tuple:
        rows = tuple(row for row, times in enumerate(column) if times > number)
        if rows not in known:
            kind = "scattered"
            if not rows:
                kind = "none"
            elif len(rows) == batch:
                kind = "all"
            elif rows[-1] - rows[0] + 1 == len(rows):
                kind = "range"
            place = {row: i for i, row in enumerate(rows)}
            known[rows] = rows, kind, tuple(place.get(row, -1) for row in range(batch))
        return known[rows]

    pairs = [(visit(column, 0), visit(column, 1)) for column in columns]
    schedule, kinds, ranks = ([(once[f], twice[f]) for once, twice in pairs] for f in range(3))
    gathers = sum(kind == "scattered" for pair in kinds for kind in pair)
    return schedule, kinds, ranks, tuple(map(sum, plan.tolist())), gathers


def order_rows(plan: np.ndarray) -> list[int]:
    """A short tour through the different paths, from the path that runs nothing back to it."""
    rows, paths = _distinct(plan)
    tour = _shortest_tour(paths) if len(paths) <= MAX_EXACT else _short_tour(paths)
    return [row for path in tour for row in rows[path]]


def group_paths(paths: np.ndarray, max_batch: int, visit_cost: list[float], exact_steps: int) -> list[list[int]]:
    """Batches in which few different visits are run."""
    if not len(paths):
        return []
    rows, different = _distinct(paths)
    runs = np.stack([different >= 1, different == 2], axis=2).reshape(len(different), -1)  # [k, 2L]
    counts = [len(r) for r in rows]
    if prod((count + 1) * (count + 2) // 2 for count in counts) <= exact_steps:
        batches = _exact_batches(runs, counts, max_batch, visit_cost)
    else:
        cost = np.array(visit_cost)
        number = {row: path for path, same in enumerate(rows) for row in same}
        arrival = [number[row] for row in range(len(paths))]
        alphabetical = sorted(arrival, key=lambda path: different[path].tolist())
        tried = [
            _greedy_batches(runs, counts, max_batch, cost),
            *([order[i : i + max_batch] for i in range(0, len(order), max_batch)] for order in (alphabetical, arrival)),
        ]
        batches = min(tried, key=lambda some: sum(runs[batch].any(axis=0) @ cost for batch in some))
    batches.sort(key=len)
    while len(batches) > 1 and len(batches[0]) + len(batches[1]) <= max_batch:  # merging never costs anything
        batches = sorted([batches[0] + batches[1], *batches[2:]], key=len)
    left = [iter(same) for same in rows]
    return sorted(sorted(next(left[path]) for path in batch) for batch in batches)


def _distinct(paths: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """The rows of each different path, by first appearance, and those paths [k, L]."""
    rows = defaultdict(list)
    for row, path in enumerate(paths):
        rows[path.tobytes()].append(row)
    return list(rows.values()), paths[[same[0] for same in rows.values()]].astype(np.int64)


def _distances(paths: np.ndarray) -> list[list[int]]:
    """[k + 1, k + 1] visits in which two paths differ; the last one is the path that runs nothing."""
    points = np.concatenate([paths, np.zeros((1, paths.shape[1]), dtype=np.int64)])
    return [np.abs(points - point).sum(axis=1).tolist() for point in points]


def _shortest_tour(paths: np.ndarray) -> list[int]:
    """Held and Karp, from the end backwards; of all shortest tours the first."""
    count, distance = len(paths), _distances(paths)
    everything = (1 << count) - 1
    rest = [[inf] * (count + 1) for _ in range(everything + 1)]  # [visited][last] -> what is still to go
    rest[everything] = [distance[last][count] for last in range(count + 1)]

    def steps(done: int, last: int) -> list[tuple[float, int]]:
        return [(distance[last][n] + rest[done | 1 << n][n], n) for n in range(count) if not done >> n & 1]

    for done in range(everything - 1, -1, -1):
        for last in range(count + 1):
            rest[done][last] = min(steps(done, last))[0]
    tour, done = [], 0
    while done != everything:
        tour.append(min(steps(done, tour[-1] if tour else count))[1])
        done |= 1 << tour[-1]
    return tour


def _short_tour(paths: np.ndarray) -> list[int]:
    """The best of the given order and some tours by nearest neighbours."""
    count, distance = len(paths), np.array(_distances(paths))
    tours = [list(range(count))]
    for start in range(0, count, -(-count // STARTS)):
        tour, left = [start], np.ones(count, dtype=bool)
        left[start] = False
        while len(tour) < count:
            tour.append(int(np.where(left, distance[tour[-1], :count], distance.max() + 1).argmin()))
            left[tour[-1]] = False
        tours.append(tour)
    return min(tours, key=lambda tour: sum(distance[a, b] for a, b in pairwise([count, *tour, count])))


def _exact_batches(runs: np.ndarray, counts: list[int], max_batch: int, visit_cost: list[float]) -> list[list[int]]:
    """best(left) = min over the batches out of what is left, with its last path, of W(batch) + best(left - batch)."""
    count = len(counts)
    masks = [sum(1 << v for v in np.flatnonzero(path).tolist()) for path in runs]
    weights: dict[int, float] = {}

    def weight(mask: int) -> float:
        if mask not in weights:
            weights[mask] = sum(c for v, c in enumerate(visit_cost) if mask >> v & 1)
        return weights[mask]

    def batches(left: tuple[int, ...], path: int, room: int, must: bool):
        """(copies of the paths up to `path`, their union), at most `room` rows of what is left."""
        if path < 0:
            yield (), 0
            return
        for copies in range(int(must), min(left[path], room) + 1):
            for others, union in batches(left, path - 1, room - copies, False):
                yield (*others, copies), union | masks[path] * (copies > 0)

    best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {(0,) * count: (0.0, ())}
    for left in np.ndindex(*(n + 1 for n in counts[::-1])):
        left = left[::-1]
        if left in best:
            continue
        last = max(path for path in range(count) if left[path])
        choices = []
        for copies, union in batches(left, last, max_batch, True):
            copies = copies + (0,) * (count - last - 1)
            choices.append((weight(union) + best[tuple(a - b for a, b in zip(left, copies, strict=True))][0], copies))
        best[left] = min(choices)
    out, left = [], tuple(counts)
    while any(left):
        copies = best[left][1]
        out.append([path for path, n in enumerate(copies) for _ in range(n)])
        left = tuple(a - b for a, b in zip(left, copies, strict=True))
    return out


def _greedy_batches(runs: np.ndarray, counts: list[int], max_batch: int, cost: np.ndarray) -> list[list[int]]:
    """Each batch begins with the heaviest path that is left, then takes what adds least; of several the heaviest."""
    heaviest = np.argsort(-(runs @ cost), kind="stable")
    order, left = runs[heaviest], np.array(counts)[heaviest]
    batches = []
    while left.any():
        batch: list[int] = []
        union = np.zeros(runs.shape[1], dtype=bool)
        while len(batch) < max_batch and left.any():
            growth = np.where(left > 0, order @ (cost * ~union), inf)
            at = int(growth.argmin()) if batch else int((left > 0).argmax())
            copies = min(int(left[at]), max_batch - len(batch))
            batch += [int(heaviest[at])] * copies
            left[at] -= copies
            union |= order[at]
        batches.append(batch)
    return batches
