"""The report of an evaluation: tables, picture and page of the same figures.

    report = evaluate(model, tokenizer, items, routers=checkpoint)
    print(report.text())
    report.write(folder)  # report.json, report.md, report.png, report.html

No text of the data is in any of them.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from drllm_fast.atomic import written
from drllm_fast.evaluation.outcomes import FORMAT


@dataclass(frozen=True)
class EvaluationReport:
    """`figures` is what `drllm_fast.evaluation.figures.figures_of` makes; everything else reads nothing but them."""

    figures: dict[str, Any]

    @classmethod
    def read(cls, path: str | PathLike[str]) -> EvaluationReport:
        """From a report.json. ValueError for another file."""
        figures = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(figures, dict) or {name: figures.get(name) for name in FORMAT} != FORMAT:
            raise ValueError(f"{path} is no report of an evaluation: expected {FORMAT}")
        return cls(figures)

    def text(self, width: int = 110) -> str:
        """Tables in plain text, `width` columns wide."""
        from drllm_fast.evaluation.report_text import text

        return text(self.figures, width)

    def markdown(self) -> str:
        from drllm_fast.evaluation.report_text import markdown

        return markdown(self.figures)

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """The measure against layers run; see `drllm_fast.evaluation.report_plot.plot`."""
        from drllm_fast.evaluation.report_plot import plot

        return plot(self.figures, path)

    def html(self) -> str:
        """One page that needs no other file; with the picture if matplotlib is there."""
        from drllm_fast.evaluation.report_html import page

        return page(self.figures, self._picture())

    def write(self, folder: str | PathLike[str]) -> list[Path]:
        """Write report.json, report.md and report.html, and report.png if matplotlib is there; returns what was
        written. Each file appears complete or not at all, in place of an earlier one. OSError where that fails."""
        from drllm_fast.evaluation.report_html import page

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        picture, markdown = self._picture(), self.markdown()
        contents = {"report.json": (json.dumps(self.figures, indent=1, allow_nan=False) + "\n").encode()}
        if picture is None:
            (folder / "report.png").unlink(missing_ok=True)  # an earlier report's
        else:
            contents["report.png"] = picture
            markdown += "\n![Accuracy or perplexity against layers run](report.png)\n"
        contents |= {"report.md": markdown.encode(), "report.html": page(self.figures, picture).encode()}
        for name, content in contents.items():
            with written(folder / name) as file:
                file.write(content)
        return [folder / name for name in contents]

    def _picture(self) -> bytes | None:
        try:
            figure = self.plot()
        except ImportError:
            return None
        data = io.BytesIO()
        figure.savefig(data, dpi=150, format="png")
        return data.getvalue()
