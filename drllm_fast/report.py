"""Routing for people: a table of what each prompt ran, and a heat map of the plan."""

from __future__ import annotations

import io
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from drllm_fast.router_reference import EXECUTE, REPEAT, SKIP
from drllm_fast.stats import RoutingStats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ROWS = 32
LABEL_WIDTH = 36
RANGES_WIDTH = 18
COLOURS = {SKIP: "#E69F00", EXECUTE: "#E3E8EE", REPEAT: "#0072B2"}  # orange and blue of Okabe and Ito, pale in between
NAMES = {SKIP: "skip", EXECUTE: "execute", REPEAT: "repeat"}
FORMATS = (".png", ".svg", ".pdf")


def stdout_console() -> Console:
    """For tables on stdout: as wide as the terminal, or wide enough where there is none."""
    return Console(width=None if sys.stdout.isatty() else 120)


def ranges(numbers: Iterable[int], width: int = RANGES_WIDTH) -> str:
    """Ascending integers as compact ranges: [3, 19, 20, 21] -> '3 19-21'; '-' for none.

    What does not fit in `width` characters is counted: '0 4 7 9 12 15 .. +11'.
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    text, kept = " ".join(parts) or "-", len(parts)
    while len(text) > width and kept:
        kept -= 1
        text = " ".join([*parts[:kept], f".. +{sum(b - a + 1 for a, b in runs[kept:])}"])
    return text


def human_bytes(count: int) -> str:
    """Bytes in binary units with three digits: 1536 -> '1.50 KiB'."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 999.5 or unit == "TiB":
            break
        size /= 1024
    if unit == "B":
        return f"{count} B"
    return f"{size:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f} {unit}"


def human_pair(held: int, dense: int) -> str:
    """Two counts of bytes in the unit of the second: '1.17 / 1.21 MiB'."""
    number, unit = human_bytes(dense).split()
    if unit == "B":
        return f"{held} / {dense} B"
    size = held / 1024 ** ("KiB", "MiB", "GiB", "TiB").index(unit) / 1024
    return f"{size:.{len(number.partition('.')[2])}f} / {number} {unit}"


def row_labels(labels: Sequence[Any] | None, rows: int, tokenizer: Any = None) -> list[str]:
    """One short line a row. A label is text, or token ids that `tokenizer` decodes; None numbers the rows.

    Raises ValueError for a wrong number of labels, TypeError for ids without a tokenizer.
    """
    if labels is None:
        return [f"row {row}" for row in range(rows)]
    if isinstance(labels, str):
        raise TypeError("labels must be a sequence with one label a row, got one str")
    if len(labels) != rows:
        raise ValueError(f"{len(labels)} labels for a plan of {rows} rows; give one label a row")
    lines = []
    for label in labels:
        if not isinstance(label, str):
            if tokenizer is None:
                raise TypeError(f"a label of type {type(label).__name__} needs tokenizer= to be decoded")
            label = tokenizer.decode(label, skip_special_tokens=True)
        line = "".join(c for c in " ".join(label.split()) if unicodedata.category(c) not in ("Cc", "Cs"))
        lines.append(line if len(line) <= LABEL_WIDTH else line[: LABEL_WIDTH - 3].rstrip() + "...")
    return lines


def summary_table(stats: RoutingStats, tokenizer: Any = None, labels: Sequence[Any] | None = None) -> Table:
    """A `rich` table with one line a prompt (at most 32) and the totals of all of them below.

    labels: one a row, text or token ids (decoded with `tokenizer`). Layers are numbered from 0. `share` is visits
    over the dense model's; KV is what the cache holds now, over what the dense model would hold.
    Raises ValueError or TypeError for labels that do not fit.
    """
    rows, layers = stats.plan.shape
    names = row_labels(labels, rows, tokenizer)
    plan, kv, dense = stats.plan.cpu(), stats.per_row_kv_bytes.tolist(), stats.per_row_kv_bytes_dense.tolist()
    run, tokens, share = stats.layers_run.tolist(), stats.tokens.tolist(), stats.per_row.tolist()

    shown = range(min(rows, MAX_ROWS))
    first = [names[row] for row in shown] + ([f"... and {rows - MAX_ROWS} more"] if rows > MAX_ROWS else [])
    footer = [
        count(rows, "prompt"),
        str(sum(tokens)),
        f"{sum(run) / rows:.1f} of {layers}" if rows else "",
        count(int((plan == SKIP).sum()), "skip"),
        count(int((plan == REPEAT).sum()), "repeat"),
        f"{100 * stats.share:.1f} %",
        human_pair(stats.kv_bytes, stats.kv_bytes_dense),
    ]
    # Fits 80 columns for short lists of blocks; prompts shrink first, then those lists fold.
    table = Table(show_footer=True, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("prompt", footer[0], min_width=10)
    table.add_column("tokens", footer[1], justify="right", no_wrap=True)
    table.add_column("layers run", footer[2], justify="right", no_wrap=True)
    table.add_column("skipped", footer[3])
    table.add_column("repeated", footer[4])
    table.add_column("share", footer[5], justify="right", no_wrap=True)
    table.add_column("KV held / dense", footer[6], justify="right", no_wrap=True)
    for row, name in enumerate(first):
        if row == MAX_ROWS:
            table.add_row(name)
            continue
        table.add_row(
            Text(name, no_wrap=True, overflow="ellipsis"),
            str(tokens[row]),
            f"{run[row]} of {layers}",
            ranges((plan[row] == SKIP).nonzero()[:, 0].tolist()),
            ranges((plan[row] == REPEAT).nonzero()[:, 0].tolist()),
            f"{100 * share[row]:.1f} %",
            human_pair(kv[row], dense[row]),
        )
    return table


def summary(
    stats: RoutingStats, tokenizer: Any = None, labels: Sequence[Any] | None = None, *, width: int = 120
) -> str:
    """`summary_table` as plain text, `width` columns wide."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(summary_table(stats, tokenizer, labels))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")


def plot_plan(
    stats_or_plan: RoutingStats | Tensor | Sequence[Sequence[int]],
    path: str | PathLike[str] | None = None,
    labels: Sequence[Any] | None = None,
    title: str | None = None,
    tokenizer: Any = None,
) -> Figure:
    """Heat map of a plan, prompts by layers: skip, execute and repeat each in a colour of its own.

    Saves to `path` (.png, .svg or .pdf) where one is given, and returns the matplotlib figure, which belongs to no
    pyplot state. Raises ValueError for a plan that is not [B, L] of 0, 1 and 2, for labels that do not fit and for
    another file ending, ImportError without matplotlib, OSError where `path` cannot be written.
    """
    plan = torch.as_tensor(stats_or_plan.plan if isinstance(stats_or_plan, RoutingStats) else stats_or_plan).cpu()
    if plan.dim() == 1:
        plan = plan[None]
    if plan.dim() != 2 or plan.numel() == 0 or plan.is_floating_point() or plan.min() < SKIP or plan.max() > REPEAT:
        raise ValueError(f"a plan is [rows, layers] of integers 0, 1 and 2, got {plan.dtype} {tuple(plan.shape)}")
    if path is not None and Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"cannot tell the format of {str(path)!r}: end it with one of {', '.join(FORMATS)}")
    rows, layers = plan.shape
    names = row_labels(labels, rows, tokenizer) if labels is not None else None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError('plotting needs matplotlib: pip install "drllm-fast[plot]"') from error

    named = names is not None and rows <= 64
    cell = min(0.32, max(8.0 / rows, 0.03))  # inches; 256 rows stay on one page
    width = min(max(0.26 * layers, 4.0), 14.0) + (3.2 if named else 0.6)
    figure = Figure(figsize=(width, max(cell * rows, 0.32) + 1.25), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(
        plan.numpy(),
        cmap=ListedColormap([COLOURS[value] for value in (SKIP, EXECUTE, REPEAT)]),
        vmin=SKIP,
        vmax=REPEAT,
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    if named:
        axes.set_yticks(range(rows), names, fontsize=8 if cell >= 0.16 else 6, parse_math=False)
    else:
        axes.set_ylabel("prompt")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=min(rows, 12), integer=True, min_n_ticks=1))
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xticks([x + 0.5 for x in range(layers - 1)], minor=True)
    if cell >= 0.1:
        axes.set_yticks([y + 0.5 for y in range(rows - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.0 if layers <= 64 else 0.4)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    mean = plan.sum().item() / rows
    axes.set_title(
        title
        if title is not None
        else f"{count(rows, 'prompt')}: {mean:.1f} of {layers} blocks on average ({100 * mean / layers:.1f} %)",
        fontsize=10,
        loc="left",
        parse_math=False,
    )
    counts = [(plan == value).sum().item() for value in (SKIP, EXECUTE, REPEAT)]
    figure.legend(
        handles=[
            Patch(facecolor=COLOURS[value], edgecolor="#8A94A0", linewidth=0.5, label=f"{NAMES[value]} ({count})")
            for value, count in zip((SKIP, EXECUTE, REPEAT), counts, strict=True)
        ],
        loc="outside lower right",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    if path is not None:
        with warnings.catch_warnings():  # a label may hold what the font lacks: a box is drawn there
            warnings.filterwarnings("ignore", message=r"Glyph \d+|Matplotlib currently does not support")
            figure.savefig(path, dpi=160)
    return figure


def count(number: int, noun: str) -> str:
    """'1 row', '2 rows'."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
