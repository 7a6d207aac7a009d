"""What a search shows while it runs: a bar on a terminal, a line now and then elsewhere. Both on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from drllm_fast.search.paths import decode, visits
from drllm_fast.search.unit import UnitResult

EVERY = 15.0  # seconds between lines


class Figures:
    """Counts over the units that are finished: found ones, which an earlier run stored, have no figures here."""

    def __init__(self, total: int, found: int):
        self.total, self.found = total, found
        self.units = self.kept = self.paths = 0
        self.saved = 0
        self.begun = time.monotonic()

    def add(self, result: UnitResult) -> None:
        self.units += 1
        self.paths += result.forwards
        if result.kept:
            self.kept += 1
            self.saved += len(result.best) - visits(decode(result.best))

    def text(self) -> str:
        """'34.2 paths/s, kept 78 %, saved 2.1 layers, 0:12:40 left'"""
        seconds = time.monotonic() - self.begun
        parts = [f"{self.paths / seconds:.1f} paths/s" if seconds > 0 else ""]
        if self.units:
            parts.append(f"kept {self.kept / self.units:.0%}")
            parts.append(f"saved {self.saved / max(self.kept, 1):.1f} layers")
            left = (self.total - self.found - self.units) * seconds / self.units
            parts.append(f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02} left")
        return ", ".join(filter(None, parts))


class Lines:
    """A line every `EVERY` seconds."""

    def __init__(self, figures: Figures):
        self.figures = figures
        self._last = time.monotonic()

    def advance(self, result: UnitResult) -> None:
        self.figures.add(result)
        now = time.monotonic()
        if now - self._last >= EVERY:
            self._last = now
            done = self.figures.found + self.figures.units
            print(f"searched {done} of {self.figures.total}: {self.figures.text()}", file=sys.stderr, flush=True)


@contextmanager
def shown(total: int, found: int) -> Iterator[object]:
    """The progress of `total` units of which `found` are stored already; has a method `advance(result)`."""
    figures = Figures(total, found)
    if not sys.stderr.isatty():
        yield Lines(figures)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        "Searching",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=found, figures="")

        class Bar:
            def advance(self, result: UnitResult) -> None:
                figures.add(result)
                bar.update(task, advance=1, figures=figures.text())

        yield Bar()
