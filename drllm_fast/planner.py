"""Planning on the host: what a forward must know of its plan, how to order a batch, which sequences should share one.

All of it is about visits. Visit (l, n), n = 0 or 1, is pass n of layer l; a path p runs it where p[l] > n. At decode
the weights of a block are read if any row of the batch runs it, so sequences that run the same visits should share a
batch; and the rows that run a visit must be gathered unless they lie next to each other.

In C++ where the extension is compiled, else as in planner_reference.py, which is the specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from drllm_fast import ops, planner_reference

if ops.EXTENSION_ERROR is None:
    from drllm_fast import _C as _implementation
else:
    _implementation = planner_reference

# Batches are formed exactly where that takes at most this many steps: prod((m + 1) (m + 2) / 2) over the different
# paths, each of which m rows have. So for any 10 rows, and for 20 rows of each of two paths.
EXACT_STEPS = 3**10


@dataclass(frozen=True)
class DecodePlan:
    """What a forward must know of a plan [B, L].

    schedule  [L] pairs: the rows (ascending) that run the layer's first visit, and its second
    kinds     [L] pairs: how those rows lie in the batch: "none" of them; "all"; a "range" without gaps, of which a view
              is enough; "scattered", which must be gathered
    ranks     [L] pairs of [B]: each row's place among the rows of the visit, -1 where it does not run it
    visits    [B], how many visits each row runs
    gathers   how many visits run scattered rows

    Visits of the same rows share one tuple, so that a result may be kept under it.
    """

    schedule: list[tuple[tuple[int, ...], tuple[int, ...]]]
    kinds: list[tuple[str, str]]
    ranks: list[tuple[tuple[int, ...], tuple[int, ...]]]
    visits: tuple[int, ...]
    gathers: int


def decode_plan(plan: ArrayLike) -> DecodePlan:
    """Everything about a plan: integers [B, L], 0 skip, 1 execute, 2 repeat (a tensor, an array or nested lists).

    Raises TypeError for anything but integers, ValueError for another shape or value.
    """
    return DecodePlan(*_implementation.decode_plan(_paths(plan)))


def order_rows(plan: ArrayLike) -> list[int]:
    """An order of the rows of a plan [B, L] that leaves few runs: the numbers of the rows, in their new order.

    A run is a maximal sequence of neighbouring rows that execute a visit; a visit of one run needs no gather. Their
    number, over all visits, is

        runs(order) = 1/2 sum_{i=0}^{B} H(order[i], order[i + 1])

    H(a, b) being how many visits one of two rows runs and the other does not, which is sum_l |a[l] - b[l]|; at both
    ends stands a row that runs nothing. So this is a shortest tour: exactly for 10 different paths or fewer (of several
    the first, in lexicographic order of first appearances), else the best tour by nearest neighbours, 2-opt and or-opt.
    Rows of the same path stay together. Never more runs than in the given order; deterministic.

    Raises as `decode_plan` does.
    """
    return _implementation.order_rows(_paths(plan))


def count_runs(plan: ArrayLike) -> int:
    """The runs of a plan [B, L] in the given order, as in `order_rows`. Raises as `decode_plan` does."""
    paths = _paths(plan).astype(np.int64)
    ends = np.zeros((1, paths.shape[1]), dtype=np.int64)
    return int(np.abs(np.diff(np.concatenate([ends, paths, ends]), axis=0)).sum()) // 2


def group_paths(
    paths: ArrayLike, max_batch: int, *, visit_cost: ArrayLike = 1.0, row_cost: ArrayLike = 0.0
) -> list[list[int]]:
    """Batches of at most `max_batch` of the rows of paths [N, L] that cost little, by `grouping_cost`.

    Every row is in one batch. The rows of a batch ascend, and so do the batches' first rows. Optimal where there are
    few rows (EXACT_STEPS); else the best of several partitions after a local search, never more expensive than filling
    batches in order of arrival or in lexicographic order. The two smallest batches never fit into one. Deterministic.

    `row_cost` changes nothing here: a row pays it for its own visits, in whatever batch. It is accepted so that both
    functions take the same costs. Raises TypeError or ValueError.
    """
    checked = _paths(paths)
    if isinstance(max_batch, bool) or not isinstance(max_batch, int | np.integer):
        raise TypeError(f"max_batch must be an integer, got {type(max_batch).__name__}")
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}")
    _cost(row_cost, "row_cost", checked.shape[1])
    cost = _cost(visit_cost, "visit_cost", checked.shape[1]).ravel()
    scaled = np.ldexp(cost, -np.frexp(cost.max(initial=0))[1])  # below 1, exactly, so that no sum overflows
    return _implementation.group_paths(checked, min(int(max_batch), len(checked)), scaled.tolist(), EXACT_STEPS)


def grouping_cost(
    paths: ArrayLike, batches: Sequence[Sequence[int]], *, visit_cost: ArrayLike = 1.0, row_cost: ArrayLike = 0.0
) -> float:
    """What batches of the rows of paths [N, L] cost:

        sum over batches, over the visits v that a row of the batch runs, of
            visit_cost[v] + row_cost[v] * (rows of the batch that run v)

    Both are finite numbers >= 0, one for all visits or [L, 2]. visit_cost stands for what a visit costs whoever runs it
    (its weights are read, its kernels launched). The part of row_cost is the same for all partitions; with it the sum
    is the whole cost of a step, so that the share which grouping saves comes out right.

    Raises TypeError or ValueError, also for a row that is not there or is named twice.
    """
    checked = _paths(paths)
    visit, row = (_cost(c, n, checked.shape[1]) for c, n in ((visit_cost, "visit_cost"), (row_cost, "row_cost")))
    runs = np.stack([checked >= 1, checked == 2], axis=2)  # [N, L, 2]
    seen: set[int] = set()
    total = 0.0
    for batch in batches:
        for index in batch:
            if isinstance(index, bool) or not isinstance(index, int | np.integer):
                raise TypeError(f"batches must be lists of row numbers, got {index!r}")
            if not 0 <= index < len(checked):
                raise ValueError(f"row {index} is in a batch, but there are only {len(checked)} rows, from 0")
            if index in seen:
                raise ValueError(f"row {index} is in the batches twice")
            seen.add(int(index))
        rows = runs[list(batch)].sum(axis=0)
        total += float(((visit + row * rows) * (rows > 0)).sum())
    return total


def _paths(given: ArrayLike) -> np.ndarray:
    """int8 [N, L], checked. An empty list is no paths."""
    allowed = "layer paths are integers [rows, layers]: 0 skip, 1 execute, 2 repeat"
    try:
        if isinstance(given, Tensor):
            given = given.detach().cpu().numpy()
        paths = np.array(given)  # a copy, since the GIL is released while it is read
    except (TypeError, ValueError) as error:
        raise type(error)(f"not a table of paths ({error}); {allowed}") from error
    if paths.shape == (0,):
        paths = np.zeros((0, 0), dtype=np.int8)
    if paths.dtype.kind not in "iu" and paths.size:
        raise TypeError(f"paths of {paths.dtype}; {allowed}")
    if paths.ndim != 2:
        raise ValueError(f"paths of shape {list(paths.shape)}; {allowed}")
    if paths.size and (paths.min() < 0 or paths.max() > 2):
        raise ValueError(f"paths with values from {paths.min()} to {paths.max()}; {allowed}")
    return np.ascontiguousarray(paths, dtype=np.int8)


def _cost(given: ArrayLike, name: str, layers: int) -> np.ndarray:
    """float64 [L, 2], checked."""
    allowed = f"{name} is a finite number >= 0, or [{layers}, 2] of them, one for each visit"
    cost = np.asarray(given)
    if cost.dtype.kind not in "iuf":
        raise TypeError(f"{name} of {cost.dtype}; {allowed}")
    if cost.shape not in ((), (layers, 2)):
        raise ValueError(f"{name} of shape {list(cost.shape)}; {allowed}")
    cost = np.broadcast_to(cost.astype(np.float64), (layers, 2))
    if not (np.isfinite(cost).all() and (cost >= 0).all()):
        raise ValueError(f"{name} with values from {cost.min()} to {cost.max()}; {allowed}")
    return cost
