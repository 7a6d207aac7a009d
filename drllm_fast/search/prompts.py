"""The prompt of each task, as lm-eval 0.4.13 writes it.

A form turns a row ({"question", "choices", "answer", ...}) into the text before an answer and the texts of the choices.
A prompt is the description, the solved examples and the question; a choice begins with the form's delimiter. Where a
form is not lm-eval's, its comment says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drllm_fast.search.unit import Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _own_choices(row: Row) -> list[str]:
    return row["choices"]


def _letters(row: Row) -> list[str]:
    return list(LETTERS[: len(row["choices"])])


@dataclass(frozen=True)
class Form:
    """How a task asks.

    text            the question, up to where the answer begins
    choices         the texts to choose from
    gold            the right answer, an index where there are choices
    solution        a free answer as a solved example shows it
    delimiter       between question and answer
    between         between solved examples
    description     before the first example
    shots           solved examples, unless asked otherwise
    shots_like      solved examples are those whose value of this key is the item's
    first_shots     they are the first ones, instead of drawn ones
    stop, max_new_tokens    of a free answer
    grader          what suits a free answer
    """

    text: Callable[[Row], str]
    choices: Callable[[Row], list[str]] = _own_choices
    gold: Callable[[Row], int | str] = lambda row: row["answer"]
    solution: Callable[[Row], str] = lambda row: row["answer"]
    delimiter: str = " "
    between: str = "\n\n"
    description: Callable[[Row], str] = lambda row: ""
    shots: int = 0
    shots_like: str | None = None
    first_shots: bool = False
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 16
    grader: str = "exact"


def build_item(
    row: Row,
    form: Form,
    examples: Sequence[Row] = (),
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat: bool = False,
    max_new_tokens: int | None = None,
) -> Item:
    """The item of a row after solved `examples`. With `chat`, all of the prompt is one user's turn in the tokenizer's
    template, and choices begin the assistant's turn without a space. ValueError if there is no template, or no question
    to put into a turn."""
    question = form.text(row)
    prompt = form.description(row) + "".join(solved(example, form) + form.between for example in examples) + question
    delimiter = form.delimiter
    if chat:
        if not question.strip():
            raise ValueError(f"row {row['id']} of {row['task']} asks no question, so that it cannot be a user's turn")
        prompt, delimiter = chat_prompt(prompt, tokenizer), ""
    choices = None
    if row["choices"] is not None:
        choices = tuple(delimiter + (choice.lstrip() if chat else choice) for choice in form.choices(row))
    return Item(
        id=row["id"],
        task=row["task"],
        prompt=prompt,
        choices=choices,
        answer=form.gold(row),
        aliases=tuple(row.get("aliases") or ()),
        stop=() if choices else form.stop,
        max_new_tokens=max_new_tokens or form.max_new_tokens,
        level=row.get("level"),
    )


def solved(row: Row, form: Form) -> str:
    """A question with its right answer."""
    answer = form.solution(row) if row["choices"] is None else form.choices(row)[row["answer"]]
    return form.text(row) + form.delimiter + answer


def chat_prompt(text: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text as the user's turn, up to where the assistant's begins. ValueError without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat=True needs a tokenizer with a chat template; pass one, or load the task with chat=False")
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _question(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer:"


def _verbatim(row: Row) -> str:
    return row["question"]


def _listed(row: Row) -> str:
    lines = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"], strict=False))
    return f"{row['question'].strip()}\n{lines}Answer:"


def _mmlu_description(row: Row) -> str:
    subject = str(row.get("subject") or "").replace("_", " ")
    about = f" about {subject}" if subject else ""
    return f"The following are multiple choice questions (with answers){about}.\n\n"


def _copa(row: Row) -> str:
    # Some copies put a comma before the connector.
    return re.sub(r",? (because|therefore)$", r" \1", row["question"])


def _copa_choices(row: Row) -> list[str]:
    # With the delimiter these begin with two spaces, and so they do in lm-eval.
    return [f" {choice[:1].lower()}{choice[1:]}" for choice in row["choices"]]


def _siqa(row: Row) -> str:
    question = re.sub(r"^Context: (.*)\nQuestion: ", r"\1 ", row["question"], flags=re.DOTALL)
    return f"Q: {question}\nA:"


def _winogrande_choices(row: Row) -> list[str]:
    rest = row["question"].partition("_")[2]
    return [choice + rest for choice in row["choices"]]


def _agieval(row: Row) -> str:
    listed = " ".join(_agieval_choices(row))
    last = LETTERS[len(row["choices"]) - 1]
    return f"Q: {row['question']} Answer Choices: {listed}\nA: Among A through {last}, the answer is"


def _agieval_choices(row: Row) -> list[str]:
    return [f"({letter}){choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False)]


def _answer_or_unanswerable(row: Row) -> int | str:
    return row["answer"] if row["answer"] != "" else "unanswerable"


def _boxed(row: Row) -> str:
    ask = "Please reason step by step, and put your final answer within \\boxed{}."
    return f"Problem: {row['question']}\n{ask}\nSolution:"


def _worked(row: Row) -> str:
    return row.get("solution") or f"\\boxed{{{row['answer']}}}"


TRUTHFULQA = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

"""

_QUESTION = Form(_question)
_AGIEVAL = Form(_agieval, _agieval_choices)
# Not lm-eval's, whose zero-shot forms ask for no box; minerva_math is.
_BOXED = Form(_boxed, solution=_worked, stop=("\nProblem:",), max_new_tokens=512, grader="math-verify")

FORMS: dict[str, Form] = {
    "question": _QUESTION,
    "verbatim": Form(_verbatim),
    "letters": Form(_listed, _letters),
    "text": Form(_verbatim),
    "sentences": Form(_verbatim),
    "arc_easy": _QUESTION,
    "arc_challenge": _QUESTION,
    "openbookqa": Form(_verbatim),
    "piqa": _QUESTION,
    "hellaswag": Form(_verbatim),
    "copa": Form(_copa, _copa_choices),
    "blimp": Form(_verbatim),
    # Not lm-eval's, which scores what follows the gap after each option; here option and rest are scored together.
    "winogrande": Form(lambda row: row["question"].partition("_")[0].rstrip(), _winogrande_choices),
    "siqa": Form(_siqa),
    "commonsense_qa": Form(lambda row: f"Question: {_listed(row)}", _letters),
    "truthfulqa_mc1": Form(lambda row: f"Q: {row['question']}\nA:", description=lambda row: TRUTHFULQA),
    "mmlu": Form(_listed, _letters, description=_mmlu_description, shots_like="subject", first_shots=True),
    "agieval_aqua_rat": _AGIEVAL,
    "agieval_lsat_ar": _AGIEVAL,
    "agieval_lsat_lr": _AGIEVAL,
    "agieval_sat_en": _AGIEVAL,
    "agieval_sat_math": _AGIEVAL,
    "gsm8k": Form(
        _question,
        solution=lambda row: row.get("solution") or f"#### {row['answer']}",
        shots=5,
        stop=("Question:", "</s>", "<|im_end|>"),
        max_new_tokens=256,
        grader="math-verify",
    ),
    "svamp": Form(_question, stop=("Question:",), max_new_tokens=128, grader="math-verify"),
    "math": _BOXED,
    "dart": _BOXED,
    # lm-eval's four examples are fixed ones.
    "minerva_math": Form(
        lambda row: f"Problem:\n{row['question']}\n\nSolution:",
        solution=_worked,
        shots=4,
        stop=("Problem:",),
        max_new_tokens=512,
        grader="math-verify",
    ),
    # lm-eval asks whether the last word is the likeliest continuation, which greedy decoding answers as well.
    "lambada_openai": Form(_verbatim, max_new_tokens=8, grader="first-word"),
    # lm-eval puts the article's title first, which the rows do not have.
    "squad_v2": Form(
        lambda row: f"Background: {row['question']}\n\nAnswer:",
        gold=_answer_or_unanswerable,
        solution=_answer_or_unanswerable,
        max_new_tokens=24,
    ),
    "synth_arith": Form(_verbatim, between="\n", shots=3, shots_like="level", max_new_tokens=8),
}


def form_of(task: str) -> Form:
    """The form of a task. ValueError, with the list of forms, where there is none."""
    if task not in FORMS:
        raise ValueError(
            f"no prompt form for the task {task!r}; known are {', '.join(sorted(FORMS))}. For other data name a form, "
            "such as form='question' (--form question)"
        )
    return FORMS[task]


def grader_of(task: str) -> str:
    """The grader that suits a task's free answers; 'exact' for a task without a form of its own."""
    return FORMS.get(task, _QUESTION).grader
