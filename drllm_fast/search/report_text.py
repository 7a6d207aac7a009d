"""A search's report in words: tables with a sentence above each, as plain text and as Markdown."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

UNKNOWN, NONE = "not known", "-"
TOP_BLOCKS = 6


@dataclass(frozen=True)
class Section:
    """`note` is what a reader has to know to take the figures for what they are."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def text(figures: dict[str, Any], width: int = 100) -> str:
    """Plain text, `width` columns wide."""
    return as_text(sections(figures), width)


def markdown(figures: dict[str, Any]) -> str:
    return as_markdown("Search report", sections(figures))


def as_text(sections: Iterable[Section], width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    for section in sections:
        console.print(Text(section.title.upper()))
        if section.note:
            console.print(Text(section.note))
        table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for index, column in enumerate(section.columns):
            table.add_column(column, justify="right" if index else "left", overflow="fold")
        for row in section.rows:
            table.add_row(*map(Text, row))
        console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")


def as_markdown(title: str, sections: Iterable[Section]) -> str:
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.note:
            lines += [section.note, ""]
        align = ["---", *["---:"] * (len(section.columns) - 1)]
        for row in (section.columns, align, *section.rows):
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |")
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def sections(figures: dict[str, Any]) -> list[Section]:
    found = [_search(figures), _accuracy(figures), _repair(figures), _breaks(figures), _static(figures)]
    found += [_saved(figures), _cost(figures)]
    if figures["paths"]["kept"]:
        found.append(_paths(figures))
    if len(figures["tasks"]) > 1 or figures["levels"]:
        found.append(_groups(figures))
    return found


def _search(figures: dict[str, Any]) -> Section:
    search = figures["search"]
    reward = search["reward"]
    if reward == "agreement":
        reward += f" of {search['agree']} paths"
    rows = [
        ("units", number(search["units"])),
        ("tasks", _counted(search["tasks"])),
        ("model", _said(search["model"])),
        ("layers", _said(search["layers"])),
        ("method", _said(search["method"])),
        ("reward", _said(reward)),
        ("simulations", _said(search["simulations"])),
        ("graders", _counted(search["graders"])),
        ("seed", _said(search["seed"])),
    ]
    note = "A unit is one prompt, searched once."
    if search["label_free"]:
        note += (
            " The reward kl sees no label: a path counts as correct where it gives the dense path's own answer, and "
            "the search does not aim at repairs."
        )
    return Section("Search", note, ("", "value"), rows)


def _accuracy(figures: dict[str, Any]) -> Section:
    accuracy = figures["accuracy"]
    rows = [
        _share("dense path", accuracy["dense"]),
        _share("each prompt on its best path (oracle)", accuracy["best"]),
        _share("some path right (oracle)", accuracy["oracle"]),
        _share("units kept for training", accuracy["kept"]),
    ]
    note = (
        "Oracle figures pick a path after seeing the answer. They bound what a router could do and are no accuracy "
        "that anything has reached; see the control."
    )
    if accuracy["dense"]["n"] < figures["search"]["units"]:
        note += " Free answers are left out: without a label it is not known which are right."
    if accuracy["not_finite"]:
        note += f" Warning: units with a score that is no finite number: {number(accuracy['not_finite'])}."
    return Section("Accuracy", note, ("", "share", "95 % interval", "n"), rows)


def _repair(figures: dict[str, Any]) -> Section:
    repair, control = figures["repair"], figures["repair"]["control"]
    rows = [_share("found: some tried path is right", repair["found"])]
    rows.append(_share("repaired: the best path is right", repair["repaired"]))
    note = "Of the units whose dense path is wrong."
    if control["reached"]["n"]:
        rows += [
            _share("with a control: repaired", control["repaired"]),
            _share("with a control: wrong target reached", control["reached"]),
            _mean("difference, in points", control["difference"], points),
            ("only repaired / only target reached", f"{control['only_repaired']} / {control['only_reached']}", "", ""),
        ]
        note += (
            " The control is the same search towards a given wrong answer, on the same units. What it reaches as well "
            "is luck; only the difference speaks for repairs."
        )
    else:
        note += " No unit has a control (another wrong answer to search for), so luck is not measured here."
    return Section("Repairs, and the wrong-option control", note, ("", "share", "95 % / SE", "n"), rows)


def _breaks(figures: dict[str, Any]) -> Section:
    breaks = figures["breaks"]
    rows = [
        _share("right answers that some tried path breaks", breaks["units"]),
        _mean("tried paths a unit", breaks["tried"], decimals),
        _ratio("tried paths that break", breaks["tried_break"]),
        _ratio("random single edits that break", breaks["probes_break"]),
        _ratio("random single edits that repair", breaks["probes_repair"]),
    ]
    note = (
        "Of the units whose dense path is right; the last line, of those where it is wrong. Tried paths are chosen by "
        "the search, which may stop early; the random edits are drawn without looking at outcomes. SE by unit."
    )
    return Section("Breaks", note, ("", "figure", "95 % / SE", "n"), rows)


def _static(figures: dict[str, Any]) -> Section:
    static = figures["static"]
    rows = []
    for name, best in (("best", static["best"]), ("best that saves layers", static["best_saving"])):
        if best is None:
            rows.append((name, "not enough probes", "", "", ""))
            continue
        edits = " and ".join(dict.fromkeys(way["edit"] for way in best["ways"]))
        figure = points(best["gain"]), f"± {points(best['se'], sign=False)}", points(best["selection_gain"])
        rows.append((f"{name}: {edits}", *figure, number(best["n"])))
    note = (
        "One edit for every prompt: chosen on one half of the items, measured on the other, and the other way round. "
        "Gain over the dense path in points of accuracy. Where chosen, the gain is too good by the luck of the choice."
    )
    if static["measure"] == "agreement":
        note += " Without labels: agreement with the dense path's answers, not accuracy."
    if static["best"] is None or static["best_saving"] is None:
        note += f" An edit needs {static['least']} observations in each half."
    return Section("Best static edit, held out", note, ("", "gain", "SE", "where chosen", "n"), rows)


def _saved(figures: dict[str, Any]) -> Section:
    saved, rows = figures["saved"], []
    for name, key in (
        ("kept", "kept"),
        ("kept: wrong answers repaired", "repaired"),
        ("kept: answers preserved", "preserved"),
        ("all, dense where nothing was kept", "all"),
    ):
        mean, share = saved[key], saved[f"share_{key}"]
        value, spread, n = _mean(name, mean, decimals)[1:]
        rows.append((name, value, spread, NONE if share is None else percent(share), n))
    note = (
        "Layers saved a unit by its best path (negative: it is longer). Oracle figures as well: the path was picked "
        "for this very prompt."
    )
    return Section("Layers saved", note, ("units", "saved", "SE", "of all layers", "n"), rows)


def _cost(figures: dict[str, Any]) -> Section:
    cost = figures["cost"]
    rows = [
        ("paths run", number(cost["forwards"])),
        ("paths run a unit", decimals(cost["forwards_per_unit"])),
        ("paths run a kept unit", decimals(cost["forwards_per_kept"])),
        ("visits of blocks, for distinct path prefixes", number(cost["visits"])),
        ("visits of the same paths one by one", number(cost["visits_alone"])),
        ("ratio", decimals(cost["ratio"])),
        ("seconds, summed over units", decimals(cost["seconds"])),
    ]
    note = (
        "Paths of controls and probes included. Units run side by side, so that their seconds overlap and the sum is "
        "longer than the search took."
    )
    return Section("Cost", note, ("", "value"), rows)


def _paths(figures: dict[str, Any]) -> Section:
    paths = figures["paths"]
    rows = [(path["edit"], number(path["units"]), percent(path["units"] / paths["kept"])) for path in paths["common"]]
    note = f"{number(paths['kept'])} kept units on {number(paths['distinct'])} distinct paths."
    for word, counts in (("skipped", paths["skipped"]), ("repeated", paths["repeated"])):
        top = sorted((block for block in range(len(counts)) if counts[block]), key=lambda block: -counts[block])
        if top:
            note += f" Most often {word}: {', '.join(f'{b} ({counts[b]})' for b in top[:TOP_BLOCKS])}."
    return Section("Common paths", note, ("path", "units", "share"), rows)


def _groups(figures: dict[str, Any]) -> Section:
    rows = []
    groups = figures["tasks"] if len(figures["tasks"]) > 1 else []
    for group in [*groups, *figures["levels"]]:
        name = group["task"] + (f", level {group['level']}" if "level" in group else "")
        shares = (percent(group[key]["share"]) or NONE for key in ("dense", "best", "repaired", "kept"))
        rows.append((name, *shares, number(group["kept"]["n"])))
    columns = ("", "dense", "best path (oracle)", "wrong ones repaired", "kept", "n")
    return Section("By task and level", "", columns, rows)


def number(value: int) -> str:
    return f"{value:,}"


def percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


def points(value: float, *, sign: bool = True) -> str:
    return f"{100 * value:{'+' if sign else ''}.1f}"


def decimals(value: float | None, *, sign: bool = True) -> str:
    return NONE if value is None else f"{value:,.2f}"


def _said(value: Any) -> str:
    return UNKNOWN if value is None else str(value)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({number(n)})" for name, n in counts.items()) or "none"


def _share(name: str, share: dict[str, Any]) -> tuple[str, ...]:
    if not share["n"]:
        return name, NONE, "", "0"
    return name, percent(share["share"]), f"{100 * share['low']:.1f} - {100 * share['high']:.1f}", number(share["n"])


def _mean(name: str, mean: dict[str, Any], form: Any) -> tuple[str, ...]:
    if not mean["n"]:
        return name, NONE, "", "0"
    return name, form(mean["mean"]), _spread(mean["se"], form), number(mean["n"])


def _ratio(name: str, ratio: dict[str, Any]) -> tuple[str, ...]:
    if not ratio["n"]:
        return name, NONE, "", "0"
    return name, percent(ratio["share"]), _spread(ratio["se"], points), f"{number(ratio['of'])} in {number(ratio['n'])}"


def _spread(se: float | None, form: Any) -> str:
    return "" if se is None else f"± {form(se, sign=False)}"
