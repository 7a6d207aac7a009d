"""Tasks by name: local JSON Lines, built-in arithmetic, or a Hugging Face data set, as items to search paths for.

arc_easy.train.jsonl.gz                     rows as in `drllm_fast.search.rows`
synth_arith, synth_arith:1-2                `drllm_fast.search.arithmetic`, all levels or some
text:FILE.txt, sentences:FILE.txt.gz        unlabelled text, as in `drllm_fast.search.running_text`
hf:allenai/ai2_arc:ARC-Easy:train           a data set, its configuration and its split, through `datasets`
hf:./folder                                 a folder that `datasets` can read

All but the last two may end in :train or :validation, which is a part of their rows: a third is for validation, by a
hash of a row's id, or of its document, so that no row and no document is in both.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drllm_fast.search.arithmetic import LEVELS, arithmetic
from drllm_fast.search.layouts import LAYOUTS, by_fields, find_layout
from drllm_fast.search.prompts import FORMS, Form, build_item, form_of
from drllm_fast.search.rows import SUFFIXES, Row, check_rows, read_jsonl
from drllm_fast.search.running_text import KINDS, text_rows
from drllm_fast.search.unit import Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = ("train", "validation")  # of a file
SPLITS = ("train", "validation", "test")  # in the order in which one is taken where none is named
Fields = Mapping[str, str | Sequence[str]]


def load_task(
    spec: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat: bool = False,
    shots: int | None = None,
    limit: int | None = None,
    levels: Sequence[int] | str | None = None,
    seed: int = 0,
    fields: Fields | None = None,
    form: str | None = None,
    examples: str | None = None,
    max_new_tokens: int | None = None,
    drop_unanswered: bool = False,
    rows: list[Row] | None = None,
) -> list[Item]:
    """The items of a task, in the order of its data.

    spec            see above
    tokenizer, chat a chat model's template around each prompt
    shots           solved examples before the question; the form's own number by default
    limit           the first so many items
    levels          only these: [1, 2], or '1-2', or '1,4'
    seed            of drawn examples, and of generated arithmetic
    fields          the columns of other data: {"question": ..., "choices": ..., "answer": ...}, see `by_fields`
    form            a prompt form of `drllm_fast.search.prompts.FORMS`, instead of the one of the row's task
    examples        another spec to take solved examples from; the task's own rows by default, never the item itself
    max_new_tokens  of a free answer, instead of the form's
    drop_unanswered leave out rows with an empty answer, which no grader can use; otherwise they are an error
    rows            what `load_rows` gave for the spec, if they are loaded already

    The same arguments give the same items; an item's prompt does not depend on `limit` and `levels`. ValueError or
    OSError says what is wrong with a spec, a file or a row.
    """
    for name, value, least in (("limit", limit, 1), ("shots", shots, 0), ("max_new_tokens", max_new_tokens, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}={value}; it must be at least {least}")
    rows = load_rows(spec, seed=seed, fields=fields) if rows is None else rows
    rows = _answered(rows, form, drop_unanswered)
    pool = _answered(load_rows(examples, seed=seed, fields=fields), form, drop_unanswered) if examples else rows
    chosen = _of_levels(rows, levels)[:limit]
    forms = {name: form_of(form or name) for name in dict.fromkeys(row["form"] for row in chosen)}
    # The same examples for every item, as far as may be: prompts then begin alike.
    drawers = {
        name: _Examples(
            pool if examples else [row for row in pool if row["form"] == name],
            one,
            one.shots if shots is None else shots,
            seed,
        )
        for name, one in forms.items()
    }
    return [
        build_item(
            row,
            forms[row["form"]],
            drawers[row["form"]].before(row),
            tokenizer=tokenizer,
            chat=chat,
            max_new_tokens=max_new_tokens,
        )
        for row in chosen
    ]


def load_rows(spec: str, *, seed: int = 0, fields: Fields | None = None) -> list[Row]:
    """The checked rows of a spec, before any prompt."""
    kind, _, rest = spec.partition(":")
    if kind == "hf":
        return _hugging_face(rest, fields)
    whole, _, part = spec.rpartition(":")
    if part not in PARTS:
        return _whole(spec, seed, fields)
    rows = [row for row in _whole(whole, seed, fields) if part_of(row) == part]
    if not rows:
        raise ValueError(f"{whole} has no rows in its part for {part}; it is too short to be parted")
    return rows


def evenly(items: list[Any], limit: int | None) -> list[Any]:
    """At most `limit` of the items, at even distances: data sets are often sorted, by level or kind, and the first so
    many would be of one."""
    if limit is None or limit >= len(items):
        return items
    return [items[number * len(items) // limit] for number in range(limit)]


def part_of(row: Row) -> str:
    """Whether a row is for train or for validation."""
    name = row.get("document", row["id"])
    return PARTS[hashlib.blake2b(name.encode(), digest_size=2).digest()[0] % 3 == 2]


def _whole(spec: str, seed: int, fields: Fields | None) -> list[Row]:
    kind, _, rest = spec.partition(":")
    if kind == "synth_arith":
        return check_rows((row["id"], row) for row in arithmetic(parse_levels(rest) if rest else LEVELS, seed=seed))
    if kind in KINDS:
        return text_rows(spec, seed=seed)
    if not spec.endswith(SUFFIXES):
        raise ValueError(
            f"unknown task {spec!r}; known are a file that ends in {' or '.join(SUFFIXES)}, synth_arith, "
            "synth_arith:1-2, text:FILE.txt, sentences:FILE.txt, each of them with :train or :validation after it, and "
            f"hf:DATASET[:CONFIG][:SPLIT]. Prompt forms: {', '.join(sorted(FORMS))}"
        )
    path = Path(spec).expanduser()
    if not path.is_file():
        raise OSError(f"there is no file {path}")
    convert = by_fields(fields) if fields else None
    return check_rows(read_jsonl(path), task=path.name.removesuffix(".gz").removesuffix(".jsonl"), convert=convert)


def parse_levels(text: str) -> list[int]:
    """'1-3' or '1,4' as a list. ValueError for anything else."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            found += range(int(first), int(last if dash else first) + 1)
    except ValueError:
        found = []
    if not found:
        raise ValueError(f"levels {text!r}; write them as 2, 1-3 or 1,4")
    return found


class _Examples:
    """Solved examples for the items of one form: per group (its `shots_like`), one more than needed, in fixed order."""

    def __init__(self, pool: Sequence[Row], form: Form, shots: int, seed: int) -> None:
        self.form, self.shots = form, shots
        self.groups: dict[Any, list[Row]] = {}
        if not shots:
            return
        # Questions that recur under several ids count once: else an item could be shown its own answer, or run short.
        distinct: dict[tuple[str, tuple[str, ...]], Row] = {}
        for row in pool:
            distinct.setdefault(_content(row), row)
        for row in distinct.values():
            self.groups.setdefault(self._group(row), []).append(row)
        for group, rows in self.groups.items():
            if not form.first_shots:
                rows = random.Random(f"{seed}/{group}").sample(rows, min(shots + 1, len(rows)))
            self.groups[group] = rows[: shots + 1]

    def before(self, row: Row) -> list[Row]:
        """The examples to show before a row's question. ValueError if there are too few."""
        if not self.shots:
            return []
        drawn = self.groups.get(self._group(row), [])
        others = [other for other in drawn if _content(other) != _content(row)]
        if len(others) < self.shots:
            like = f" with its {self.form.shots_like} {self._group(row)!r}" if self.form.shots_like else ""
            raise ValueError(
                f"{self.shots} solved examples were asked for, and row {row['id']} of {row['task']} has {len(others)} "
                f"others{like}; ask for fewer shots, or name more rows with examples=... (--examples)"
            )
        return others[: self.shots]

    def _group(self, row: Row) -> Any:
        return row.get(self.form.shots_like) if self.form.shots_like else None


def _content(row: Row) -> tuple[str, tuple[str, ...]]:
    return row["question"], tuple(row["choices"] or ())


def _answered(rows: list[Row], form: str | None, drop: bool) -> list[Row]:
    empty = [form_of(form or row["form"]).gold(row) == "" for row in rows]
    answered = [row for row, without in zip(rows, empty, strict=True) if not without]
    if any(empty) and not drop:
        row = rows[empty.index(True)]
        raise ValueError(
            f"{sum(empty)} of {len(rows)} rows have an empty answer (the first is {row['id']} of {row['task']}), which "
            "no grader can use; answer them, or leave them out with drop_unanswered=True (--drop-unanswered)"
        )
    if not answered:
        raise ValueError(f"none of the {len(rows)} rows has an answer")
    return answered


def _of_levels(rows: list[Row], levels: Sequence[int] | str | None) -> list[Row]:
    if levels is None:
        return rows
    wanted = set(parse_levels(levels) if isinstance(levels, str) else levels)
    if chosen := [row for row in rows if row["level"] in wanted]:
        return chosen
    present = sorted({row["level"] for row in rows} - {None})
    raise ValueError(f"no rows of the levels {sorted(wanted)}; there are {present or 'no levels in this data'}")


def _hugging_face(rest: str, fields: Fields | None) -> list[Row]:
    if importlib.util.find_spec("datasets") is None:
        raise OSError('data sets of Hugging Face need the package datasets; pip install "drllm-fast[search]"')
    from datasets import DatasetDict, load_dataset

    name, config, split = _dataset_spec(rest)
    try:
        loaded = load_dataset(name, config, split=split)
    except Exception as error:  # what load_dataset raises has no common class
        raise OSError(f"cannot load hf:{rest}: {type(error).__name__}: {error}") from error
    if isinstance(loaded, DatasetDict):
        split = next((split for split in SPLITS if split in loaded), next(iter(loaded)))
        loaded = loaded[split]
    convert, task = _conversion(loaded.column_names, f"{name}:{config or ''}", fields)

    def places() -> Iterator[tuple[str, Row]]:
        for index, row in enumerate(loaded):
            yield f"hf:{name}, {split} row {index}", {**row, "id": row.get("id", f"{split}/{index}")}

    return check_rows(places(), task=task, convert=convert)


def _dataset_spec(rest: str) -> tuple[str, str | None, str | None]:
    """Name, configuration and split of DATASET[:CONFIG][:SPLIT]; what follows a lone colon is a split if its name is
    one of the usual ones."""
    name, *more = rest.split(":")
    if not name or len(more) > 2:
        raise ValueError(f"hf:{rest} is not hf:DATASET[:CONFIG][:SPLIT]")
    if len(more) == 1 and more[0] in (*SPLITS, "dev"):
        return name, None, more[0]
    config, split = (*more, None, None)[:2]
    return name, config or None, split or None


def _conversion(columns: Sequence[str], name: str, fields: Fields | None) -> tuple[Callable[[Row, str], Row], str]:
    if fields is not None:
        return by_fields(fields), name.rstrip(":")
    layout = find_layout(columns, name)
    if layout is None:
        known = ", ".join(sorted({layout.task for layout in LAYOUTS}))
        raise ValueError(
            f"the columns {', '.join(columns)} are of no known layout (known: {known}); "
            "name them with fields={'question': ..., 'choices': ..., 'answer': ...}"
        )

    def convert(row: Row, where: str) -> Row:
        try:
            return {"id": row["id"], "task": layout.task, **layout.convert(row)}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: cannot be read as {layout.task}: {error}") from error

    return convert, layout.task
