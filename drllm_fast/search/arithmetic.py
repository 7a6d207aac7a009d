"""Graded arithmetic without a data set: five levels of sums, each a closed set of distinct questions.

1  a + b            one digit each
2  a + b, a - b     two digits with one
3  a + b, a - b     two digits each, never below zero
4  a * b            2 to 12
5  (a + b) * c      2 to 20, 2 to 9
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

LEVELS = (1, 2, 3, 4, 5)
_ONE, _TWO, _TABLE = range(10), range(10, 100), range(2, 13)


@lru_cache
def _questions(level: int) -> tuple[tuple[str, int], ...]:
    if level == 1:
        return tuple((f"{a} + {b}", a + b) for a in _ONE for b in _ONE)
    if level in (2, 3):
        pairs = [(a, b) for a in _TWO for b in (_ONE[1:] if level == 2 else _TWO)]
        sums = [(f"{a} + {b}", a + b) for a, b in pairs]
        return tuple(sums + [(f"{a} - {b}", a - b) for a, b in pairs if a >= b])
    if level == 4:
        return tuple((f"{a} * {b}", a * b) for a in _TABLE for b in _TABLE)
    return tuple((f"({a} + {b}) * {c}", (a + b) * c) for a in range(2, 21) for b in range(2, 21) for c in range(2, 10))


def count(level: int) -> int:
    """How many distinct questions a level has. ValueError for an unknown level."""
    _check(level)
    return len(_questions(level))


def arithmetic(levels: Sequence[int] = LEVELS, per_level: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of `per_level` distinct questions of each level (all of them by default), the levels taking turns so that
    every beginning of the list is balanced. A level's order depends on the seed alone, and a row's id on its question
    alone. ValueError for an unknown level, or for more questions than a level has."""
    columns = []
    for level in dict.fromkeys(levels):
        _check(level)
        questions = list(_questions(level))
        random.Random(f"{seed}/{level}").shuffle(questions)
        if per_level is not None and not 0 < per_level <= len(questions):
            raise ValueError(f"{per_level} questions of level {level} were asked for; it has 1 to {len(questions)}")
        columns.append([_row(level, question, answer) for question, answer in questions[:per_level]])
    longest = max(map(len, columns), default=0)
    return [column[index] for index in range(longest) for column in columns if index < len(column)]


def _row(level: int, question: str, answer: int) -> dict[str, Any]:
    return {
        "id": f"L{level}/{question.replace(' ', '')}",
        "task": "synth_arith",
        "split": "generated",
        "question": f"{question} =",
        "choices": None,
        "answer": str(answer),
        "level": level,
    }


def _check(level: int) -> None:
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r} of arithmetic; known are {', '.join(map(str, LEVELS))}")
