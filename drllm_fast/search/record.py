"""A unit's result as a flat row of plain values, and back; what goes in comes out equal."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from drllm_fast.search.unit import UnitKey, UnitResult

# The key's own `prompt` is a hash, beside the result's `prompt`, which is the text.
KEY_COLUMNS = {"prompt": "prompt_hash"} | {f.name: f.name for f in fields(UnitKey) if f.name != "prompt"}
KEY = "key"  # UnitKey.text()

# Numbers of numpy or torch would not survive JSON.
_PLAIN = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "list[str]": lambda values: [str(x) for x in values],
    "list[float]": lambda values: [float(x) for x in values],
    "list[bool]": lambda values: [bool(x) for x in values],
    "list[list[float]]": lambda values: [[float(x) for x in row] for row in values],
}


def columns() -> dict[str, str]:
    """Name and type of each column, in order; types as annotations, without `| None`."""
    key = {KEY: "str"} | {KEY_COLUMNS[f.name]: str(f.type) for f in fields(UnitKey)}
    return key | {f.name: str(f.type).removesuffix(" | None") for f in fields(UnitResult) if f.name != "key"}


def to_row(result: UnitResult) -> dict[str, Any]:
    row: dict[str, Any] = {KEY: result.key.text()}
    row |= {column: getattr(result.key, name) for name, column in KEY_COLUMNS.items()}
    row |= {f.name: getattr(result, f.name) for f in fields(UnitResult) if f.name != "key"}
    return {name: None if row[name] is None else _PLAIN[kind](row[name]) for name, kind in columns().items()}


def from_row(row: dict[str, Any]) -> UnitResult:
    key = UnitKey(**{name: row[column] for name, column in KEY_COLUMNS.items()})
    return UnitResult(key, **{f.name: row[f.name] for f in fields(UnitResult) if f.name != "key"})
