"""An evaluation as one page: tables and picture in a single file, without scripts, for light and dark screens."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from drllm_fast.evaluation.report_text import TITLE, sections
from drllm_fast.search.report_text import Section

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #666; --line: #ddd; --stripe: #f6f7f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --soft: #a0a0a0; --line: #383b40; --stripe: #1e2125; }
}
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 0.3rem; }
p { color: var(--soft); margin: 0 0 0.6rem; max-width: 50rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.setting td { text-align: left; white-space: normal; }
th { font-weight: 600; } tbody tr:nth-child(even) { background: var(--stripe); }
img { max-width: 100%; background: #fff; border-radius: 6px; padding: 0.5rem; box-sizing: border-box; }
"""


def page(figures: dict[str, Any], picture: bytes | None) -> str:
    """HTML. picture: a PNG to show between the setting and the tables."""
    first, *rest = sections(figures)
    image = ""
    if picture is not None:
        data = base64.b64encode(picture).decode()
        text = "Accuracy or perplexity of each task against the share of layers run; the tables hold the same figures."
        image = f'<img alt="{text}" src="data:image/png;base64,{data}">\n'
    title = escape(f"{TITLE}: {figures['model']}")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{title}</h1>\n{_section(first, 'setting')}{image}{''.join(map(_section, rest))}</body>\n</html>\n"
    )


def _section(section: Section, kind: str = "wide") -> str:
    head = _row("th", section.columns) if any(section.columns[1:]) else ""
    body = "".join(_row("td", row) for row in section.rows)
    return (
        f"<h2>{escape(section.title)}</h2>\n<p>{escape(section.note)}</p>\n"
        f'<div class="{kind}"><table>\n<thead>{head}</thead>\n<tbody>{body}</tbody>\n</table></div>\n'
    )


def _row(cell: str, texts: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{cell}>{escape(text)}</{cell}>' for text in texts)}</tr>\n"
