"""An evaluation as one picture: for each task the measure against the mean share of layers run."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drllm_fast.atomic import written
from drllm_fast.evaluation.outcomes import PERPLEXITY
from drllm_fast.evaluation.report_text import label
from drllm_fast.report import FORMATS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito's palette, told apart by most colour-blind readers; markers tell the same.
ROUTERS, DENSE, RANDOM, ORACLE = "#0072B2", "#333333", "#999999", "#CC79A7"
STATIC = (("#D55E00", "s"), ("#009E73", "^"), ("#E69F00", "D"), ("#56B4E9", "v"))
COLUMNS = 3
WIDE = 8.0  # of perplexities: a largest of so many times the smallest asks for a logarithmic axis


def plot(figures: dict[str, Any], path: str | PathLike[str] | None = None) -> Figure:
    """A panel a task. Saves to `path` (.png, .svg or .pdf) where one is given, and returns the matplotlib figure, which
    belongs to no pyplot state. ValueError for another file ending, ImportError without matplotlib, OSError where `path`
    cannot be written."""
    if path is not None and Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"cannot tell the format of {str(path)!r}: end it with one of {', '.join(FORMATS)}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plotting needs matplotlib: pip install "drllm-fast[plot]"') from error
    tasks = figures["tasks"]
    columns = min(COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(max(6.0, 4.4 * columns), 3.6 * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, task in zip(panels, tasks, strict=False):
        _panel(axes, task)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    handles = {name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    legend = {"ncols": int(figure.get_figwidth() // 2.6), "frameon": False, "fontsize": 8}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", **legend)
    figure.suptitle(f"{figures['model']}, {figures['layers']} layers", fontsize=11, parse_math=False)
    if path is not None:
        with written(Path(path)) as file:
            figure.savefig(file, dpi=150, format=Path(path).suffix.lower()[1:])
    return figure


def _panel(axes: Axes, task: dict[str, Any]) -> None:
    perplexity = task["measure"] == PERPLEXITY
    scale = 1 if perplexity else 100
    curves: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in task["rows"]:
        curves.setdefault((row["kind"], row["name"]), []).append(row)
    shown = 0
    for (kind, _), rows in curves.items():
        rows = sorted(rows, key=lambda row: row["share"])
        x = [100 * row["share"] for row in rows]
        y = [scale * row["value"] for row in rows]
        if kind == "dense":
            axes.axhline(y[0], color=DENSE, linewidth=1.1, label="dense")
            axes.plot(x, y, "o", color=DENSE, markersize=4)
        elif kind == "routers":
            low, high = ([scale * row[end] for row in rows] for end in ("low", "high"))
            axes.fill_between(
                x, low, high, color=ROUTERS, alpha=0.15, linewidth=0, label="95 % interval of the routers"
            )
            axes.plot(x, y, "o-", color=ROUTERS, linewidth=1.8, markersize=4.5, label="routers", zorder=3)
        elif kind == "static":
            colour, marker = STATIC[shown % len(STATIC)]
            shown += 1
            style = {"color": colour, "marker": marker, "linewidth": 1.1, "markersize": 4}
            axes.plot(x, y, linestyle="--", label=label(rows[0]), **style)
        elif kind == "random":
            axes.plot(x, y, "x-", color=RANDOM, linewidth=1.0, markersize=4, label=label(rows[0]))
        else:
            axes.plot(x, y, ":", color=ORACLE, linewidth=1.6, label="oracle (looks at the answer)")
    if perplexity:
        values = [row["value"] for row in task["rows"]]
        if max(values) > WIDE * min(values):
            axes.set_yscale("log")
    axes.set_title(f"{task['task']} (n = {task['n']:,})", fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel("layers run, % of the dense model's", fontsize=8)
    axes.set_ylabel("perplexity, less is better" if perplexity else "accuracy, %", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
