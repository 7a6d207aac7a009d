"""Rounds in which all rows of a table run in turn, kept line by line, and what a table says of them."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
import typer

from drllm_fast import build_info
from drllm_fast.generation.calibration import machine


class Rounds:
    """Measurements by part, round and row; kept line by line."""

    def __init__(self, file: Path, about: dict):
        self.file = file
        self.found: dict[tuple[str, int, str], dict] = {}
        if file.exists():
            first, *lines = file.read_text().splitlines()
            if json.loads(first) != about:
                raise SystemExit(f"{file} holds rounds of another set-up: {first}; give another --output")
            for line in lines:
                entry = json.loads(line)
                self.found[entry["part"], entry["round"], entry["row"]] = entry
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(about) + "\n")

    def run(self, part: str, rounds: int, rows: dict[str, Callable[[], dict]], fewer: dict[str, int] | None = None):
        """Measure what is not there yet; rows named in `fewer` take part in so many rounds only."""
        for turn in range(rounds):
            for row in list(rows)[:: 1 if turn % 2 == 0 else -1]:
                if (part, turn, row) in self.found or turn >= (fewer or {}).get(row, rounds):
                    continue
                entry = {"part": part, "round": turn, "row": row, **rows[row]()}
                self.found[part, turn, row] = entry
                with self.file.open("a") as out:
                    out.write(json.dumps(entry) + "\n")
                typer.echo(f"{part} round {turn}: {row} {entry.get('seconds', 0):.2f} s", err=True)

    def of(self, part: str, row: str, name: str = "seconds") -> list[float]:
        return [e[name] for (p, _, r), e in sorted(self.found.items()) if (p, r) == (part, row) and name in e]

    def ratios(self, part: str, over: str, row: str) -> list[float]:
        """Seconds of one row over those of another, of each round that has both."""
        turns = sorted(t for (p, t, r) in self.found if (p, r) == (part, row) and (part, t, over) in self.found)
        return [self.found[part, t, over]["seconds"] / self.found[part, t, row]["seconds"] for t in turns]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} - {max(values):.3f})"


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def ideal(block_share: float, share: float) -> float:
    return 1 / (1 - block_share * (1 - share))


def about_this_machine(device: str) -> dict:
    return {
        "device": machine(device), "threads": torch.get_num_threads(),
        "instruction_set": (build_info()["extension"] or {}).get("instruction_set"), "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
    }  # fmt: skip
