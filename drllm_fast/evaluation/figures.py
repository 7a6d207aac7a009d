"""From outcomes to figures: for each task and contender the measure, its interval, and paired differences.

The figures are plain values, fit for JSON, and hold no text of the data. `figures_of` says what each of them is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from drllm_fast import __version__
from drllm_fast.evaluation.contenders import Contender
from drllm_fast.evaluation.intervals import LEVEL, SAMPLES, difference, interval, mcnemar, resampled_means
from drllm_fast.evaluation.outcomes import (
    ACCURACY,
    FORMAT,
    PERPLEXITY,
    Group,
    Outcome,
    group_of,
    right,
    right_normalised,
)
from drllm_fast.search.paths import LayerPath, visits
from drllm_fast.search.unit import Item

KINDS = ("dense", "routers", "static", "random", "oracle")
RowName = tuple[str, str, float | None]  # kind, name, budget


@dataclass
class _Row:
    """A contender on a task. values [n]: 1 for right and 0 for wrong, or nats per token; normalised [n] or None;
    visits [n]; masks: how many these are the means of."""

    kind: str
    name: str
    budget: float | None
    values: np.ndarray
    normalised: np.ndarray | None
    visits: np.ndarray
    masks: int = 1

    @property
    def key(self) -> RowName:
        return self.kind, self.name, self.budget


def figures_of(
    items: Sequence[Item],
    compete: Sequence[Contender],
    outcomes: Sequence[Mapping[LayerPath, Outcome]],
    *,
    tokens: Sequence[int | None],
    oracle: bool,
    about: Mapping[str, Any],
    seed: int = 0,
    samples: int = SAMPLES,
) -> dict[str, Any]:
    """All figures of an evaluation.

    outcomes  for each item those of all its contenders' paths
    tokens    for each item that is a text to be predicted the number of its tokens

    The result holds what `about` holds and, beside seed, samples and level of the intervals,

        tasks     of each task its name, measure ("accuracy" or "perplexity"), n items, tokens, and rows
        averages  over the tasks of a measure: mean share, mean value, mean differences

    A row is a contender at a budget: kind, name, budget, masks (how many random ones it is the mean of), visits (the
    mean), share (of L), value with low and high, normalised (by characters; None where not all items have choices),
    kept (the value as a share of the dense one; of perplexity the inverse), versus_dense, and of the routers
    versus_static: {name, visits, mean, low, high, p, mcnemar} against the best static mask at that budget. Differences
    are of accuracy, or of nats per token; mcnemar is None where values are not 0 and 1.
    ValueError for a perplexity that is not finite.
    """
    layers = len(compete[0].paths[0])
    tasks: list[dict[str, Any]] = []
    drawn: dict[Group, dict[str, dict[RowName, np.ndarray]]] = {}
    for number, group in enumerate(dict.fromkeys(map(group_of, items))):
        chosen = [i for i, item in enumerate(items) if group_of(item) == group]
        rows = _rows(items, compete, outcomes, tokens, chosen)
        if oracle:
            budgets = sorted({c.budget for c in compete if c.budget is not None}, reverse=True)
            rows += _oracles(items, compete, outcomes, tokens, chosen, budgets, layers)
        weights = [tokens[i] for i in chosen] if group[1] == PERPLEXITY else None
        task, drawn[group] = _task(group, rows, weights, layers, [seed, number], samples)
        tasks.append(task)
    averages = [
        _average(measure, [task for task in tasks if task["measure"] == measure], drawn)
        for measure in dict.fromkeys(task["measure"] for task in tasks)
    ]
    own = {"seed": seed, "samples": samples, "level": LEVEL, "package_version": __version__}
    return {**FORMAT, **about, **own, "tasks": tasks, "averages": averages}


def _rows(
    items: Sequence[Item],
    compete: Sequence[Contender],
    outcomes: Sequence[Mapping[LayerPath, Outcome]],
    tokens: Sequence[int | None],
    chosen: Sequence[int],
) -> list[_Row]:
    alike: dict[RowName, list[_Row]] = {}
    for c in compete:
        normalised = None
        if all(items[i].choices is not None and len(items[i].choices) > 1 for i in chosen):
            normalised = np.array([right_normalised(items[i], outcomes[i][c.paths[i]]) for i in chosen], dtype=float)
        row = _Row(
            c.kind,
            c.name,
            c.budget,
            np.array([_value(items[i], outcomes[i][c.paths[i]], tokens[i]) for i in chosen]),
            normalised,
            np.array([visits(c.paths[i]) for i in chosen], dtype=float),
        )
        alike.setdefault(row.key, []).append(row)
    return sorted(
        (
            _Row(
                *key,
                np.mean([row.values for row in rows], axis=0),
                None if rows[0].normalised is None else np.mean([row.normalised for row in rows], axis=0),
                np.mean([row.visits for row in rows], axis=0),
                len(rows),
            )
            for key, rows in alike.items()
        ),
        key=_place,
    )


def _place(row: _Row) -> tuple:
    return row.budget is not None, -(row.budget or 0), KINDS.index(row.kind)


def _value(item: Item, outcome: Outcome, tokens: int | None) -> float:
    """1 or 0, or nats per token."""
    if tokens is None:
        return float(right(item, outcome))
    nats = -outcome.scores[0] / tokens
    if not math.isfinite(nats):
        raise ValueError(
            f"item {item.id} of {item.task}: its text has the log-likelihood {outcome.scores[0]} under a path; use "
            "bfloat16 or float32 if the model overflows float16, and larger budgets otherwise"
        )
    return nats


def _oracles(
    items: Sequence[Item],
    compete: Sequence[Contender],
    outcomes: Sequence[Mapping[LayerPath, Outcome]],
    tokens: Sequence[int | None],
    chosen: Sequence[int],
    budgets: Sequence[float],
    layers: int,
) -> list[_Row]:
    """For each budget and item the best outcome among the paths scored for it that run at most the budget's visits,
    rounded up; among its shortest where all run more. Of equally good ones the shortest."""
    rows = []
    sign = -1 if group_of(items[chosen[0]])[1] == PERPLEXITY else 1
    tried = [
        sorted(
            (visits(path), -sign * _value(items[i], outcomes[i][path], tokens[i]))
            for path in {c.paths[i] for c in compete}
        )
        for i in chosen
    ]
    for budget in budgets:
        limit = math.ceil(round(budget * layers, 9))
        best = []
        for options in tried:
            within = [option for option in options if option[0] <= max(limit, options[0][0])]
            best.append(min(within, key=lambda option: option[1]))  # the first of equals is the shortest
        values = np.array([-sign * loss for _, loss in best])
        rows.append(_Row("oracle", "oracle", budget, values, None, np.array([run for run, _ in best], dtype=float)))
    return rows


def _task(
    group: Group, rows: list[_Row], weights: list[int] | None, layers: int, seed: list[int], samples: int
) -> tuple[dict[str, Any], dict[str, dict[RowName, np.ndarray]]]:
    """A task's figures, and the resampled differences that its averages are made of."""
    rows = sorted(rows, key=_place)
    measure, dense = group[1], next(row for row in rows if row.kind == "dense")
    normalised = [row for row in rows if row.normalised is not None]
    columns = np.stack([row.values for row in rows] + [row.normalised for row in normalised], axis=1)
    means = resampled_means(columns, weights=weights, samples=samples, seed=seed)
    mean = np.average(columns, axis=0, weights=weights)
    at = {row.key: place for place, row in enumerate(rows)}
    second = {row.key: len(rows) + place for place, row in enumerate(normalised)}
    shown = math.exp if measure == PERPLEXITY else float

    def ends(place: int) -> dict[str, float]:
        found = interval(mean[place], means[:, place])
        return {"value": shown(found.mean), "low": shown(found.low), "high": shown(found.high)}

    def versus(row: _Row, other: _Row) -> dict[str, Any]:
        a, b = at[row.key], at[other.key]
        paired = asdict(difference(mean[a] - mean[b], means[:, a] - means[:, b]))
        exact = measure == ACCURACY and row.masks == other.masks == 1
        return {
            "name": other.name, "visits": float(other.visits.mean()), **paired,
            "mcnemar": mcnemar(row.values, other.values) if exact else None,
        }  # fmt: skip

    drawn: dict[str, dict[RowName, np.ndarray]] = {"versus_dense": {}, "versus_static": {}}
    found = []
    for row in rows:
        value = ends(at[row.key])
        whole = ends(at[dense.key])["value"]
        kept = (whole, value["value"]) if measure == PERPLEXITY else (value["value"], whole)
        figure = {
            "kind": row.kind, "name": row.name, "budget": row.budget, "masks": row.masks,
            "visits": float(row.visits.mean()), "share": float(row.visits.mean()) / layers, **value,
            "normalised": ends(second[row.key]) if row.key in second else None,
            "kept": kept[0] / kept[1] if kept[1] else None, "versus_dense": None, "versus_static": None,
        }  # fmt: skip
        rivals = [other for other in rows if other.kind == "static" and other.budget == row.budget]
        others = {"versus_dense": dense if row is not dense else None, "versus_static": None}
        if row.kind == "routers" and rivals:
            better = min if measure == PERPLEXITY else max
            others["versus_static"] = better(rivals, key=lambda other: mean[at[other.key]])
        for name, other in others.items():
            if other is not None:
                figure[name] = versus(row, other)
                drawn[name][row.key] = means[:, at[row.key]] - means[:, at[other.key]]
        found.append(figure)
    task = {
        "task": group[0], "measure": measure, "n": len(dense.values),
        "tokens": None if weights is None else sum(weights), "rows": found,
    }  # fmt: skip
    return task, drawn


def _average(
    measure: str, tasks: Sequence[dict[str, Any]], drawn: Mapping[Group, Mapping[str, Mapping[RowName, np.ndarray]]]
) -> dict[str, Any]:
    """Means over tasks, each of the same weight; the tasks are resampled each by itself."""
    rows = []
    for place, first in enumerate(tasks[0]["rows"]):
        same = [task["rows"][place] for task in tasks]
        key = first["kind"], first["name"], first["budget"]
        row = {name: first[name] for name in ("kind", "name", "budget", "masks")}
        row |= {name: float(np.mean([figure[name] for figure in same])) for name in ("visits", "share", "value")}
        for name in ("versus_dense", "versus_static"):
            row[name] = None
            if first[name] is not None:
                means = np.mean([drawn[task["task"], measure][name][key] for task in tasks], axis=0)
                mean, run = (float(np.mean([figure[name][part] for figure in same])) for part in ("mean", "visits"))
                row[name] = {"visits": run, **asdict(difference(mean, means))}
        rows.append(row)
    return {"measure": measure, "tasks": [task["task"] for task in tasks], "rows": rows}
