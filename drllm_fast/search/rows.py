"""Rows of questions: what one must hold, and reading them from JSON Lines.

A row is an object with "id", "task", "question", "choices" (a list of texts, or null for a free answer), "answer" (the
index of the right choice, or the right text) and, if there are any, "level" (1, 2, ...), "subject", "aliases" (further
accepted answers), "solution" (a worked answer, for solved examples) and "form" (its prompt form, see
`drllm_fast.search.prompts.FORMS`; that of its task by default, and 'question' without a task).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz")


def read_jsonl(path: str | Path) -> Iterator[tuple[str, Row]]:
    """The objects of a .jsonl or .jsonl.gz file, each with its place ('FILE, line 3'); empty lines are passed over.
    OSError if the file cannot be read, ValueError for a line that is no JSON object."""
    path = Path(path)
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 (read after the loop)
                if line.strip():
                    yield f"{path}, line {number}", _object(line, f"{path}, line {number}")
    except (EOFError, gzip.BadGzipFile) as error:
        raise OSError(f"{path} is damaged after line {number}: {error}; make or fetch it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, after line {number}: not UTF-8 ({error}); convert the file to UTF-8") from error


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); each line must hold one object") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON {type(row).__name__}; each line must hold one object")
    return row


def check_row(row: Row, where: str, *, task: str | None = None, number: int = 0) -> Row:
    """A copy of the row in which all keys are there and of their types; `task` and `number` stand in for a missing
    task and id. ValueError, with the place, for anything else."""
    checked = {
        "id": str(row["id"]) if row.get("id") is not None else str(number),
        "task": row["task"] if row.get("task") is not None else task,
        "question": row.get("question"),
        "choices": row.get("choices"),
        "answer": row.get("answer"),
        "level": row.get("level"),
        "subject": row.get("subject"),
        "aliases": row.get("aliases"),
        "solution": row.get("solution"),
        "form": row.get("form") or row.get("task") or "question",
    }
    choices, answer = checked["choices"], checked["answer"]
    for key in ("task", "question", "form"):
        _expect(isinstance(checked[key], str), where, key, checked[key], "a text")
    if choices is None:
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            answer = checked["answer"] = str(answer)
        _expect(isinstance(answer, str), where, "answer", answer, "a text, where there are no choices")
    else:
        _expect(_texts(choices) and len(choices) > 1, where, "choices", choices, "null or a list of two texts or more")
        right = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
        _expect(right, where, "answer", answer, f"the index of the right choice, 0 to {len(choices) - 1}")
    level = checked["level"]
    whole = isinstance(level, int) and not isinstance(level, bool)
    _expect(level is None or whole, where, "level", level, "null or a whole number")
    _expect(checked["aliases"] is None or _texts(checked["aliases"]), where, "aliases", checked["aliases"], "texts")
    return checked


def check_rows(
    rows: Iterable[tuple[str, Row]], *, task: str | None = None, convert: Callable[[Row, str], Row] | None = None
) -> list[Row]:
    """All rows checked (after `convert`, which is given a row and its place). ValueError for two rows of one id, with
    both places, and for no rows at all."""
    checked: list[Row] = []
    places: dict[str, str] = {}
    for where, row in rows:
        row = check_row(convert(row, where) if convert else row, where, task=task, number=len(checked))
        if (first := places.setdefault(row["id"], where)) != where:
            raise ValueError(f"{where}: the id {row['id']!r} is taken by {first}; ids must be unique within a task")
        checked.append(row)
    if not checked:
        raise ValueError("no rows: the data set is empty")
    return checked


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


def _expect(condition: bool, where: str, key: str, given: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{where}: '{key}' is {given!r:.80}; it must be {allowed}")
