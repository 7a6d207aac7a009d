"""What a path makes of an item, and the file in which that is kept.

An outcome depends on the model, its precision, the item and the path, not on who asked for the path. So `results.jsonl`
holds outcomes by item and path, a line for each item and sitting; an evaluation goes on with whatever is there, and one
with other budgets or masks adds what is missing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drllm_fast import __version__
from drllm_fast.atomic import explained, written
from drllm_fast.search.paths import LayerPath, decode, encode
from drllm_fast.search.unit import Item, prompt_hash

FORMAT = {"format": "drllm-fast evaluation", "format_version": 1}
SETTINGS, RESULTS = "settings.json", "results.jsonl"

ACCURACY, PERPLEXITY = "accuracy", "perplexity"
Group = tuple[str, str]  # task and measure
Key = tuple[str, str, str, str]  # task, item, hash of the prompt, grader


@dataclass(frozen=True)
class Outcome:
    """scores         log-likelihood of each choice, summed over its tokens, in nats; None of a free answer
    answer, correct   what was written, cut at the item's stop texts, and the grader's verdict; None where there are
                      choices
    """

    scores: tuple[float, ...] | None = None
    answer: str | None = None
    correct: bool | None = None


def measure_of(item: Item) -> str:
    """Perplexity of an item whose only choice is a text to be predicted, accuracy of all others."""
    return PERPLEXITY if item.choices is not None and len(item.choices) == 1 else ACCURACY


def group_of(item: Item) -> Group:
    return item.task, measure_of(item)


def right(item: Item, outcome: Outcome) -> bool:
    """Whether the choice of the largest log-likelihood is the right one, or the free answer is. A score that is not
    finite makes it wrong."""
    return bool(outcome.correct) if outcome.scores is None else _taken(outcome.scores) == item.answer


def right_normalised(item: Item, outcome: Outcome) -> bool:
    """`right` of log-likelihoods divided by the choices' characters, the space before them not counted (lm-eval's
    acc_norm)."""
    lengths = [max(1, len(choice.removeprefix(" "))) for choice in item.choices or ()]
    return _taken([score / length for score, length in zip(outcome.scores or (), lengths, strict=True)]) == item.answer


def _taken(scores: Any) -> int | None:
    return int(np.argmax(scores)) if all(map(math.isfinite, scores)) else None


class Results:
    """Outcomes by item and path; in memory, and in a folder where one is given.

    folder       made when there is something to keep
    fingerprint  of the model; dtype of its weights; both kept in the folder
    check        raises ValueError for the fingerprint of another model

    Raises ValueError for a folder of another evaluation, OSError for one that cannot be read or written.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        fingerprint: dict[str, Any],
        dtype: str,
        check: Callable[[dict[str, Any]], None],
    ):
        self._known: dict[Key, dict[LayerPath, Outcome]] = {}
        self._settings = FORMAT | {"dtype": dtype, "fingerprint": fingerprint, "package_version": __version__}
        self.file = None if folder is None else folder / RESULTS
        if folder is None:
            return
        if folder.is_file():
            raise ValueError(f"{folder} is a file; give a folder for the evaluation's output")
        if (folder / SETTINGS).exists():
            _check_settings(folder, dtype, check)
        elif folder.is_dir() and any((folder / name).exists() for name in (RESULTS, "manifest.json", "report.json")):
            raise ValueError(f"{folder} holds other results and no {SETTINGS}; give another folder")
        if self.file.exists():
            self._read()

    def known(self, item: Item, grader: str) -> Mapping[LayerPath, Outcome]:
        return self._known.get(_key(item, grader), {})

    def add(self, found: list[tuple[Item, str, dict[LayerPath, Outcome]]]) -> None:
        """Keep outcomes of items under their graders, on the disk when this returns."""
        lines = []
        for item, grader, outcomes in found:
            self._known.setdefault(_key(item, grader), {}).update(outcomes)
            row = dict(zip(("task", "item", "prompt", "grader"), _key(item, grader), strict=True))
            row["outcomes"] = {encode(path): _as_json(outcome) for path, outcome in outcomes.items()}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if not (settings := self.file.with_name(SETTINGS)).exists():
                with written(settings) as file:
                    file.write((json.dumps(self._settings, indent=1) + "\n").encode())
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise explained(error, self.file) from error

    def _read(self) -> None:
        """A line that a kill cut short is taken off the file: what is added next begins a line of its own."""
        assert self.file is not None
        whole = 0
        with self.file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    key = tuple(row[name] for name in ("task", "item", "prompt", "grader"))
                    outcomes = {decode(path): _from_json(value) for path, value in row["outcomes"].items()}
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise OSError(
                        f"{self.file}, line {number} is damaged: {error!r:.120}; remove that line, or evaluate into "
                        "another folder"
                    ) from error
                self._known.setdefault(key, {}).update(outcomes)
                whole += len(line)
        if whole < self.file.stat().st_size:
            os.truncate(self.file, whole)


def _key(item: Item, grader: str) -> Key:
    return item.task, item.id, prompt_hash(item), "choice" if item.choices is not None else grader


def _as_json(outcome: Outcome) -> Any:
    if outcome.scores is not None:
        return list(outcome.scores)
    return {"answer": outcome.answer, "correct": outcome.correct}


def _from_json(value: Any) -> Outcome:
    return Outcome(**value) if isinstance(value, dict) else Outcome(scores=tuple(map(float, value)))


def _check_settings(folder: Path, dtype: str, check: Callable[[dict[str, Any]], None]) -> None:
    file = folder / SETTINGS
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{file} is damaged: {error}; evaluate into another folder") from error
    if not isinstance(values, dict) or {name: values.get(name) for name in FORMAT} != FORMAT:
        raise ValueError(f"{file} is of no evaluation that this version reads; give another folder")
    advice = "Nothing was changed; give another folder for this evaluation"
    if values.get("dtype") != dtype:
        raise ValueError(f"{folder} holds an evaluation in {values.get('dtype')}, not {dtype}. {advice}")
    try:
        check(values.get("fingerprint"))
    except ValueError as error:
        raise ValueError(f"{folder} holds an evaluation of another model: {error}. {advice}") from error
