"""Is a written answer right? Four graders, by name:

    math-verify   parses both answers as mathematics, boxed or not, and compares values (the default)
    mathruler     what the authors of Dr.LLM graded with: only a \\boxed{} answer counts
    exact         the same text after normalisation, or the same number; no package needed
    first-word    `exact` for the first word that was written (LAMBADA)

The two mathematical graders disagree, so results name theirs (`grader_version`). An answer without a box is wrong for
mathruler, and math-verify looks for the last number. A percent sign is dropped by mathruler; for math-verify 10\\% is
10 as well as 0.1. A fraction that is not reduced is wrong for mathruler. Of two different boxed answers mathruler
takes the last, and math-verify accepts neither. math-verify also takes an expression for its value, so that the echo
"3 + 7" is a right answer to 3 + 7: grade arithmetic with `exact`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from drllm_fast.search import grading_process
from drllm_fast.search.unit import Item

# What each grader imports; mathruler needs pylatexenc without saying so.
GRADERS: dict[str, tuple[str, ...]] = {
    "math-verify": ("math_verify",),
    "mathruler": ("mathruler", "pylatexenc"),
    "exact": (),
    "first-word": (),
}
EXACT_VERSION = 1  # of our own graders; raise it when a verdict of theirs changes
# A final answer stands at the end, and the graders' patterns take long on long texts.
MAX_CHARACTERS = 10_000
_NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+]?\.\d+")


def grade(kind: str, text: str, item: Item) -> bool:
    """Whether `text`, what a model wrote after `item.prompt`, holds the right answer or one of its aliases.

    The text is cut at the item's stop texts. What cannot be parsed is wrong, and so is what takes a mathematical grader
    longer than `grading_process.LIMIT` seconds. ValueError for an unknown kind; OSError if its package is missing.
    """
    check_grader(kind)
    text = cut_at_stop(text, item.stop)
    answers = (right_answer(item), *item.aliases)
    if kind == "first-word":
        return exact(text.split()[0] if text.split() else "", answers)
    if kind == "exact":
        return exact(text, answers)
    return _grade_mathematics(kind, text[-MAX_CHARACTERS:], answers)


def grader_version(kind: str) -> str:
    """The grader and the version that decides its verdicts, to be kept with results: 'math-verify 0.9.0'."""
    check_grader(kind)
    if packages := GRADERS[kind]:
        return f"{kind} {importlib.metadata.version(packages[0])}"
    return f"{kind} {EXACT_VERSION}"


def check_grader(kind: str) -> None:
    """ValueError for an unknown grader, OSError for one whose packages are not installed."""
    if kind not in GRADERS:
        raise ValueError(f"unknown grader {kind!r}; known are {', '.join(GRADERS)}")
    if missing := [package for package in GRADERS[kind] if importlib.util.find_spec(package) is None]:
        command = "mathruler pylatexenc" if kind == "mathruler" else '"drllm-fast[search]"'
        raise OSError(
            f"the grader {kind} needs {' and '.join(missing)}, which cannot be imported; pip install {command}"
        )


def right_answer(item: Item) -> str:
    """The right answer as text: of multiple choice, the right choice without its leading space."""
    if item.choices is None:
        return str(item.answer)
    return item.choices[int(item.answer)].strip()


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop texts that occurs in it."""
    ends = [end for stop in stops if (end := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def exact(text: str, answers: Sequence[str]) -> bool:
    """Whether the final answer equals one of the accepted ones: as a number where that one is a number, otherwise
    after `normalise`."""
    for answer in answers:
        value = as_number(answer)
        found = final_answer(text, number=value is not None)
        if normalise(found) == normalise(answer) or (value is not None and as_number(found) == value):
            return True
    return False


def final_answer(text: str, *, number: bool = False) -> str:
    """What a text ends up saying: the last complete \\boxed{}, else what follows the last '####', else the first line
    that is not empty. With `number`, a first line that is no number itself gives way to the text's last number."""
    if (boxed := last_boxed(text)) is not None:
        return boxed
    _, mark, after = text.rpartition("####")
    line = next((line.strip() for line in (after if mark else text).splitlines() if line.strip()), "")
    if number and as_number(line) is None:
        return (_NUMBER.findall(after if mark else text) or [line])[-1]
    return line


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} whose braces close, or None."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        depth, first = 1, start + len("\\boxed{")
        for index in range(first, end):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[first:index].strip()
        end = start
    return None


def normalise(text: str) -> str:
    """Case, form of characters, spaces, and punctuation around the text made alike."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" .,;:!?\"'`“”‘’*$")


def as_number(text: str) -> Decimal | None:
    """The value of a text that is one plain number, thousands separated or not, with or without $; otherwise None."""
    text = normalise(text)
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None


@functools.lru_cache(maxsize=4096)  # paths of one prompt often write the same
def _grade_mathematics(kind: str, text: str, answers: tuple[str, ...]) -> bool:
    # One box with the very answer needs no parser, and is right even where the parser knows no such thing.
    if text.count("\\boxed") == 1 and last_boxed(text) in answers:
        return True
    return any(grading_process.ask(kind, text, answer) for answer in answers if answer)
