"""The honesty report of a search: what was found, and how much of it is luck.

    report = SearchReport.of(store.results(), manifest=store.manifest)
    print(report.text())
    report.write(folder)  # report.json, report.md, report.png

A search that looks long enough finds a right answer by luck. Beside the oracle figures, which pick a path after seeing
the answer, stand therefore: the wrong-option control (the same search towards a given wrong answer), the share of right
answers that some tried path breaks, and what one fixed edit gains on prompts that did not choose it.

Right or wrong is known from the label: of multiple choice by the choice taken, of free answers by the grader's verdict.
The reward kl sees no label and stores "the dense path's own answer" as correct; whether a free answer is right is then
not known, and figures that need it have n = 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from drllm_fast.atomic import written
from drllm_fast.search.manifest import Manifest
from drllm_fast.search.report_tally import FORMAT, FORMAT_VERSION, Tally
from drllm_fast.search.unit import UnitResult


@dataclass(frozen=True)
class SearchReport:
    """`figures` is what `to_dict` returns; `text`, `markdown` and `plot` read nothing else."""

    figures: dict[str, Any]

    @classmethod
    def of(cls, results: Iterable[UnitResult], *, manifest: Manifest | None = None) -> SearchReport:
        """One pass over the results; none of them is kept.

        manifest: of the store they are from. Without it method, reward, model and seed are not known, and `correct` is
        taken to be graded by the label.
        ValueError for units of another search than the manifest's, or of several models or configurations.
        """
        tally = Tally(manifest)
        for result in results:
            tally.add(result)
        return cls(tally.to_dict())

    @classmethod
    def read(cls, path: str | PathLike[str]) -> SearchReport:
        """From a report.json. ValueError for another file."""
        figures = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {"format": FORMAT, "format_version": FORMAT_VERSION}
        if not isinstance(figures, dict) or {name: figures.get(name) for name in known} != known:
            raise ValueError(f"{path} is no report of a search: expected {known}")
        return cls(figures)

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON. Shares are {count, n, share, low, high}, means {n, mean, se}, see `drllm_fast.search.figures`;
        what is not known is None. `Tally.to_dict` says what each key is."""
        return self.figures

    def text(self, width: int = 100) -> str:
        """Tables in plain text, `width` columns wide."""
        from drllm_fast.search.report_text import text

        return text(self.figures, width)

    def markdown(self) -> str:
        from drllm_fast.search.report_text import markdown

        return markdown(self.figures)

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """The figures that matter as one picture; see `drllm_fast.search.report_plot.plot`."""
        from drllm_fast.search.report_plot import plot

        return plot(self.figures, path)

    def write(self, folder: str | PathLike[str]) -> list[Path]:
        """Write report.json and report.md, and report.png if matplotlib is there; returns what was written. Each file
        appears complete or not at all, in place of an earlier one. OSError where that fails."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "report.json", folder / "report.md"]
        picture = folder / "report.png"
        markdown = self.markdown()
        try:
            self.plot(picture)
        except ImportError:
            picture.unlink(missing_ok=True)  # an earlier report's
        else:
            files.append(picture)
            markdown += "\n![The figures of this report](report.png)\n"
        text = json.dumps(self.figures, indent=1, allow_nan=False) + "\n"
        for file, content in zip(files, (text, markdown), strict=False):
            with written(file) as stream:
                stream.write(content.encode())
        return files
