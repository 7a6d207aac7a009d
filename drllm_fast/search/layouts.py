"""Columns of well-known Hugging Face data sets, turned into rows (`drllm_fast.search.rows`).

A layout is known by its columns and not by the data set's name, so that copies and local folders are understood.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drllm_fast.search.grading import last_boxed

Row = dict[str, Any]
FIELDS = ("id", "question", "choices", "answer", "labels", "level", "subject", "aliases", "solution")


@dataclass(frozen=True)
class Layout:
    """The columns that tell a layout, its task, and what a row becomes."""

    columns: tuple[str, ...]
    task: str
    convert: Callable[[Row], Row]


def find_layout(columns: Sequence[str], name: str = "") -> Layout | None:
    """The first layout whose columns are all there; `name` (data set and configuration) tells ARC's two apart, and
    LAMBADA from any other text. None if there is none."""
    for layout in LAYOUTS:
        if set(layout.columns) <= set(columns) and (layout.task != "lambada_openai" or "lambada" in name.lower()):
            if layout.task == "arc_easy" and "challenge" in name.lower():
                return Layout(layout.columns, "arc_challenge", layout.convert)
            return layout
    return None


def by_fields(fields: Mapping[str, str | Sequence[str]]) -> Callable[[Row, str], Row]:
    """A conversion for columns of any name: {"question": "stem", "choices": "options.text", "answer": "key"}.

    A dot leads into nested columns; "choices" may also be a list of columns; "labels" names the texts that the answer
    chooses by. The answer of multiple choice is an index, a label, a letter, or a choice's text. ValueError for an
    unknown field, or without question and answer; later, with the row's place, for a column that a row lacks.
    """
    if unknown := set(fields) - set(FIELDS):
        raise ValueError(f"unknown fields {sorted(unknown)}; known are {', '.join(FIELDS)}")
    if missing := {"question", "answer"} - set(fields):
        raise ValueError(f"fields={dict(fields)!r:.200} names no column for {' and '.join(sorted(missing))}")

    def convert(row: Row, where: str) -> Row:
        try:
            new = {key: _column(row, column) for key, column in fields.items()}
        except KeyError as error:
            raise ValueError(f"{where}: no column {error.args[0]!r}; it has {', '.join(map(str, row))}") from None
        labels = new.pop("labels", None)
        if new.get("choices") is not None:
            new["answer"] = _index(new["answer"], new["choices"], labels, where)
        return {"id": row.get("id"), **new}

    return convert


def _column(row: Row, name: str | Sequence[str]) -> Any:
    if not isinstance(name, str):
        return [_column(row, one) for one in name]
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(name)
        value = value[part]
    return value


def _index(answer: Any, choices: Sequence[str], labels: Sequence[str] | None, where: str) -> int:
    if isinstance(answer, (list, tuple)) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, str):
        letters = [chr(ord("A") + index) for index in range(len(choices))]
        for names in filter(None, (labels, choices, letters)):
            if (stripped := answer.strip()) in (texts := [str(text).strip() for text in names]):
                return texts.index(stripped)
        if re.fullmatch(r"\d+", answer):
            answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise ValueError(
        f"{where}: the answer {answer!r:.80} is no index, label, letter or text of the choices {list(choices)!r:.200}"
    )


def _label(value: Any) -> int:
    """An index that may be written as text. ValueError for the -1 or '' of a split without answers."""
    if str(value) in ("-1", ""):
        raise ValueError("it has no answer; take a split with answers")
    return int(value)


def _key(row: Row) -> int:
    return _index(row["answerKey"] or "", row["choices"]["text"], row["choices"]["label"], "its answerKey")


def _lettered(row: Row) -> Row:
    return {"question": row["question"], "choices": row["choices"]["text"], "answer": _key(row)}


def _openbookqa(row: Row) -> Row:
    return {"question": row["question_stem"], "choices": row["choices"]["text"], "answer": _key(row)}


def _piqa(row: Row) -> Row:
    return {"question": row["goal"], "choices": [row["sol1"], row["sol2"]], "answer": _label(row["label"])}


def _hellaswag(row: Row) -> Row:
    question = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    choices = [_without_markup(ending) for ending in row["endings"]]
    return {"question": _without_markup(question), "choices": choices, "answer": _label(row["label"])}


def _without_markup(text: str) -> str:
    # WikiHow's articles left [title], [header], [step] in the texts.
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _copa(row: Row) -> Row:
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    question = f"{row['premise'].strip()[:-1]} {connector}"  # without its full stop
    return {"question": question, "choices": [row["choice1"], row["choice2"]], "answer": _label(row["label"])}


def _blimp(row: Row) -> Row:
    choices = [row["sentence_good"], row["sentence_bad"]]
    return {"question": "", "choices": choices, "answer": 0, "subject": row["UID"]}


def _mmlu(row: Row) -> Row:
    answer = _label(row["answer"])
    return {"question": row["question"], "choices": row["choices"], "answer": answer, "subject": row["subject"]}


def _gsm8k(row: Row) -> Row:
    _, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("its answer has no '####' before the result; name the columns with fields=...")
    return {"question": row["question"], "answer": answer.strip().replace(",", ""), "solution": row["answer"]}


def _math(row: Row) -> Row:
    answer = row.get("answer") or last_boxed(re.sub(r"\\boxed (\S)", r"\\boxed{\1}", row["solution"]))
    if answer is None:
        raise ValueError("its solution has no \\boxed{} answer")
    level = re.search(r"\d+", str(row["level"]))
    return {
        "question": row["problem"],
        "answer": answer,
        "solution": row["solution"],
        "level": int(level[0]) if level else None,
        "subject": row.get("type") or row.get("subject"),
    }


def _siqa(row: Row) -> Row:
    return {
        "question": f"Context: {row['context']}\nQuestion: {row['question']}",
        "choices": [row["answerA"], row["answerB"], row["answerC"]],
        "answer": _label(row["label"]) - 1,
    }


def _truthfulqa(row: Row) -> Row:
    targets = row["mc1_targets"]
    return {"question": row["question"], "choices": targets["choices"], "answer": list(targets["labels"]).index(1)}


def _svamp(row: Row) -> Row:
    answer = re.sub(r"\.0+$", "", str(row["Answer"]))
    return {"question": f"{row['Body'].strip()} {row['Question'].strip()}", "answer": answer, "subject": row["Type"]}


def _winogrande(row: Row) -> Row:
    choices = [row["option1"], row["option2"]]
    return {"question": row["sentence"], "choices": choices, "answer": _label(row["answer"]) - 1}


def _squad(row: Row) -> Row:
    texts = list(dict.fromkeys(row["answers"]["text"])) or [""]
    question = f"{row['context']}\n\nQuestion: {row['question']}"
    return {"question": question, "answer": texts[0], "aliases": texts[1:]}


def _lambada(row: Row) -> Row:
    question, _, answer = row["text"].rpartition(" ")
    return {"question": question, "answer": answer}


# The more columns the earlier, where one layout's are among another's.
LAYOUTS: tuple[Layout, ...] = (
    Layout(("question", "question_concept", "choices", "answerKey"), "commonsense_qa", _lettered),
    Layout(("question", "choices", "answerKey"), "arc_easy", _lettered),
    Layout(("question_stem", "choices", "answerKey"), "openbookqa", _openbookqa),
    Layout(("goal", "sol1", "sol2", "label"), "piqa", _piqa),
    Layout(("activity_label", "ctx_a", "ctx_b", "endings", "label"), "hellaswag", _hellaswag),
    Layout(("premise", "choice1", "choice2", "question", "label"), "copa", _copa),
    Layout(("sentence_good", "sentence_bad", "UID"), "blimp", _blimp),
    Layout(("question", "subject", "choices", "answer"), "mmlu", _mmlu),
    Layout(("problem", "solution", "level"), "math", _math),
    Layout(("context", "question", "answerA", "answerB", "answerC", "label"), "siqa", _siqa),
    Layout(("question", "mc1_targets"), "truthfulqa_mc1", _truthfulqa),
    Layout(("Body", "Question", "Answer", "Type"), "svamp", _svamp),
    Layout(("sentence", "option1", "option2", "answer"), "winogrande", _winogrande),
    Layout(("context", "question", "answers"), "squad_v2", _squad),
    Layout(("question", "answer"), "gsm8k", _gsm8k),
    Layout(("text",), "lambada_openai", _lambada),
)
