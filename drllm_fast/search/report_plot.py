"""A search's report as one picture: accuracy, repairs and their control, blocks and lengths of the kept paths."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drllm_fast.atomic import written
from drllm_fast.report import COLOURS, FORMATS
from drllm_fast.router_reference import REPEAT, SKIP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REAL, ORACLE, CONTROL = "#0072B2", "#A9CCE3", "#D55E00"  # measured; picked after seeing the answer; luck


def plot(figures: dict[str, Any], path: str | PathLike[str] | None = None) -> Figure:
    """Four panels. Saves to `path` (.png, .svg or .pdf) where one is given, and returns the matplotlib figure, which
    belongs to no pyplot state. ValueError for another file ending, ImportError without matplotlib, OSError where `path`
    cannot be written."""
    if path is not None and Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"cannot tell the format of {str(path)!r}: end it with one of {', '.join(FORMATS)}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plotting needs matplotlib: pip install "drllm-fast[plot]"') from error
    figure = Figure(figsize=(11.0, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, width_ratios=[1.25, 1.0])
    _accuracy(panels[0][0], figures)
    _repairs(panels[0][1], figures)
    _blocks(panels[1][0], figures["paths"])
    _lengths(panels[1][1], figures)
    search = figures["search"]
    words = [f"{search['units']:,} units", ", ".join(search["tasks"]), search["method"], search["reward"]]
    figure.suptitle(" · ".join(word for word in words if word), fontsize=11, parse_math=False)
    if path is not None:
        with written(Path(path)) as file:
            figure.savefig(file, dpi=150, format=Path(path).suffix.lower()[1:])
    return figure


def _accuracy(axes: Axes, figures: dict[str, Any]) -> None:
    accuracy, static = figures["accuracy"], figures["static"]
    bars = [("dense path", accuracy["dense"], REAL)]
    dense = accuracy["dense"]["share"]
    if static["measure"] == "accuracy" and dense is not None:
        for name, key in (("best static edit,\nheld out", "best"), ("the same,\nsaving layers", "best_saving")):
            if (best := static[key]) is not None:
                value, spread = dense + best["gain"], 1.96 * best["se"]
                share = {"share": value, "low": value - spread, "high": value + spread, "n": best["n"]}
                bars.append((name, share, REAL))
    bars += [
        ("best path\n(oracle)", accuracy["best"], ORACLE),
        ("some path right\n(oracle)", accuracy["oracle"], ORACLE),
    ]
    _bars(axes, bars)
    axes.set_title("Accuracy; oracles pick after seeing the answer", fontsize=10, loc="left")


def _repairs(axes: Axes, figures: dict[str, Any]) -> None:
    repair, control, breaks = figures["repair"], figures["repair"]["control"], figures["breaks"]
    bars = [("wrong answers\nrepaired", repair["repaired"], ORACLE)]
    if control["reached"]["n"]:
        bars = [
            ("repaired, where\na control ran", control["repaired"], ORACLE),
            ("control: wrong\ntarget reached", control["reached"], CONTROL),
        ]
    bars.append(("right answers\nsome path breaks", breaks["units"], CONTROL))
    _bars(axes, bars)
    axes.set_title("Repairs, and how much of that is luck", fontsize=10, loc="left")


def _bars(axes: Axes, bars: list[tuple[str, dict[str, Any], str]]) -> None:
    """Shares with their 95 % intervals; what is not known says so."""
    for place, (_, share, colour) in enumerate(bars):
        value = share["share"]
        if value is None:
            axes.text(place, 0.03, "not known", ha="center", fontsize=8)
            continue
        low, high = max(share["low"], 0.0), min(share["high"], 1.0)
        axes.bar(place, value, width=0.62, color=colour)
        axes.vlines(place, low, high, color="#333333", linewidth=1.2)
        axes.text(place, max(high, value) + 0.015, f"{100 * value:.1f} %", ha="center", fontsize=8)
    axes.set_xticks(range(len(bars)), [f"{name}\nn = {share['n']:,}" for name, share, _ in bars], fontsize=8)
    axes.set_xlim(-0.6, len(bars) - 0.4)
    axes.set_ylim(0, 1.08)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"], fontsize=8)
    _plain(axes)


def _blocks(axes: Axes, paths: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = range(len(paths["skipped"]))
    axes.bar([b - 0.2 for b in layers], paths["skipped"], width=0.4, color=COLOURS[SKIP], label="skipped")
    axes.bar([b + 0.2 for b in layers], paths["repeated"], width=0.4, color=COLOURS[REPEAT], label="repeated")
    axes.set_title(f"Blocks of the {paths['kept']:,} kept paths", fontsize=10, loc="left")
    axes.set_xlabel("layer", fontsize=9)
    axes.set_ylabel("kept units", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=8)
    axes.set_xlim(-0.6, max(len(layers), 1) - 0.4)
    highest = max([1, *paths["skipped"], *paths["repeated"]])
    axes.set_ylim(0, 1.22 * highest)  # room for the legend
    axes.legend(loc="upper right", ncols=2, frameon=False, fontsize=8)
    _plain(axes)


def _lengths(axes: Axes, figures: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    lengths, layers = figures["paths"]["visits"], figures["search"]["layers"]
    axes.bar([int(length) for length in lengths], list(lengths.values()), width=0.8, color=ORACLE)
    if layers is not None:
        axes.axvline(layers, color="#333333", linewidth=1.2, linestyle="--", label=f"dense path: {layers}")
        axes.legend(loc="upper right", frameon=False, fontsize=8)
    axes.set_title("Length of the kept paths", fontsize=10, loc="left")
    axes.set_xlabel("visits of blocks", fontsize=9)
    axes.set_ylabel("kept units", fontsize=9)
    axes.set_ylim(0, 1.22 * max([1, *lengths.values()]))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=8)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
