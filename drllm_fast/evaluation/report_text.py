"""An evaluation's report in words: for each task what was reached and what it is compared with, then the means."""

from __future__ import annotations

from typing import Any

from drllm_fast.evaluation.outcomes import PERPLEXITY
from drllm_fast.search.report_text import NONE, Section, as_markdown, as_text, decimals, number, percent, points

TITLE = "Evaluation report"


def text(figures: dict[str, Any], width: int = 110) -> str:
    """Plain text, `width` columns wide."""
    return as_text(sections(figures), width)


def markdown(figures: dict[str, Any]) -> str:
    return as_markdown(TITLE, sections(figures))


def sections(figures: dict[str, Any]) -> list[Section]:
    found = [_setting(figures)]
    for task in figures["tasks"]:
        found += [_reached(task), *_differences(task["task"], task)]
    for average in figures["averages"]:
        if len(average["tasks"]) > 1:
            found += _differences(f"mean of {len(average['tasks'])} tasks", average)
    return found


def label(row: dict[str, Any]) -> str:
    """A row's contender, in a few words."""
    if row["kind"] == "static":
        return f"static: {row['name']}"
    return f"random, mean of {row['masks']}" if row["kind"] == "random" and row["masks"] > 1 else row["name"]


def _setting(figures: dict[str, Any]) -> Section:
    graders = ", ".join(f"{name} ({task})" for task, name in figures["graders"].items())
    rows = [
        ("model", str(figures["model"])),
        ("layers", number(figures["layers"])),
        ("weights", figures["dtype"]),
        ("tasks", ", ".join(f"{task['task']} ({number(task['n'])})" for task in figures["tasks"])),
        ("graders of free answers", graders or "none needed"),
        ("seed", str(figures["seed"])),
    ]
    note = (
        f"Intervals are {100 * figures['level']:.0f} % bootstrap intervals over the items "
        f"({number(figures['samples'])} samples)."
    )
    if any(row["kind"] == "routers" for task in figures["tasks"] for row in task["rows"]):
        note += (
            " Routers read the prompt only. Static and random masks run as many visits as the routers beside them, "
            "some items one block more than others."
        )
    return Section("Evaluation", note, ("", "value"), rows)


def _reached(task: dict[str, Any]) -> Section:
    perplexity = task["measure"] == PERPLEXITY
    normalised = not perplexity and any(row["normalised"] for row in task["rows"])
    value = decimals if perplexity else percent
    rows = []
    for row in task["rows"]:
        cells = [label(row), *_run(row), value(row["value"]), _ends(row, perplexity)]
        if normalised:
            cells.append(percent(row["normalised"]["value"]) if row["normalised"] else NONE)
        rows.append((*cells, NONE if row["kept"] is None else percent(row["kept"])))
    columns = ["", "budget", "visits", "layers run", task["measure"], "95 %"]
    columns += [*(["by characters"] if normalised else []), "of dense"]
    note = f"{number(task['n'])} items" + (f" of {number(task['tokens'])} tokens." if perplexity else ".")
    if perplexity:
        note += " Of dense: the dense perplexity as a share of this one."
    if normalised:
        note += " By characters: log-likelihoods divided by the choices' lengths."
    if any(row["kind"] == "oracle" for row in task["rows"]):
        note += (
            " The oracle takes for each item the best of all paths that were scored, after looking at the answer. It "
            "is no accuracy that anything has reached."
        )
    return Section(f"{task['task']}: {task['measure']}", note, tuple(columns), rows)


def _differences(title: str, task: dict[str, Any]) -> list[Section]:
    """Every contender against the dense model, and the routers against the best static mask."""
    perplexity = task["measure"] == PERPLEXITY
    exact = any("mcnemar" in (row["versus_dense"] or {}) for row in task["rows"]) and not perplexity
    note = f"In {'nats per token, less is better' if perplexity else 'points of accuracy'}, over the same items"
    note += "; p of the bootstrap, and of McNemar's exact test." if exact else "; p of the bootstrap."
    if "tasks" in task:
        note += f" Every task counts alike: {', '.join(task['tasks'])}."
    columns = ("difference", "95 %", "p", *(["McNemar"] if exact else []))
    found = []
    against = [row for row in task["rows"] if row["versus_dense"] is not None and row["kind"] != "oracle"]
    if against:
        rows = [(label(row), *_run(row), *_versus(row["versus_dense"], perplexity, exact)) for row in against]
        head = ("", "budget", "visits", "layers run", *columns)
        found.append(Section(f"{title}: against the dense model", note, head, rows))
    against = [row for row in task["rows"] if row["versus_static"] is not None]
    if against:
        rows = []
        for row in against:
            name = row["versus_static"].get("name", "the best")
            cells = _versus(row["versus_static"], perplexity, exact)
            rows.append((name, *_run(row)[:2], f"{row['versus_static']['visits']:.2f}", *cells))
        note += " The static mask is the best one at that budget on these very items, which favours it."
        head = ("", "budget", "visits", "its visits", *columns)
        found.append(Section(f"{title}: routers against a static mask", note, head, rows))
    return found


def _run(row: dict[str, Any]) -> tuple[str, str, str]:
    return NONE if row["budget"] is None else f"{row['budget']:g}", f"{row['visits']:.2f}", percent(row["share"])


def _ends(row: dict[str, Any], perplexity: bool) -> str:
    scale, places = (1, 2) if perplexity else (100, 1)
    return f"{scale * row['low']:.{places}f} - {scale * row['high']:.{places}f}"


def _versus(versus: dict[str, Any], perplexity: bool, exact: bool) -> list[str]:
    form = (lambda value: f"{value:+.3f}") if perplexity else points
    cells = [form(versus["mean"]), f"{form(versus['low'])} to {form(versus['high'])}", _p(versus["p"])]
    if exact:
        cells.append(NONE if versus["mcnemar"] is None else _p(versus["mcnemar"]))
    return cells


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
