"""Scoring every contender on every item: the distinct paths of an item run as one tree, several items together.

Whether a path is right does not depend on the items it shares a forward with, so that neither their number nor their
order matters beyond rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from drllm_fast import fingerprint
from drllm_fast.decoder import decoder_of, unwrap
from drllm_fast.evaluation.contenders import BUDGETS, Contender, contenders, rankings
from drllm_fast.evaluation.figures import figures_of
from drllm_fast.evaluation.intervals import SAMPLES
from drllm_fast.evaluation.outcomes import PERPLEXITY, Outcome, Results, measure_of
from drllm_fast.evaluation.report import EvaluationReport
from drllm_fast.influence import StaticPolicy, skipped_blocks
from drllm_fast.search.evaluator import PathEvaluator
from drllm_fast.search.grading import check_grader, cut_at_stop, grade, grader_version
from drllm_fast.search.paths import LayerPath
from drllm_fast.search.tokens import encode_pair
from drllm_fast.search.unit import Item

TOGETHER = 16


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    output: str | PathLike[str] | None = None,
    routers: Any = None,
    budgets: Sequence[float] | None = None,
    static: Sequence[str | Path | StaticPolicy] = (),
    random_masks: int = 0,
    oracle: bool = False,
    graders: str | Mapping[str, str] = "exact",
    seed: int = 0,
    together: int = TOGETHER,
    max_tokens: int = 8192,
    samples: int = SAMPLES,
    name: str | None = None,
    progress: bool = False,
) -> EvaluationReport:
    """Accuracy, or perplexity, against layers run: the dense model, routers at their budgets, masks of their sizes.

    model, tokenizer  from transformers; with criteria to calibrate static masks by, the model must be unrouted
    items             of one task or several, as `drllm_fast.search.load_task` gives them. An item with one choice is a
                      text to be predicted; of several choices the likeliest is taken; free answers are decoded greedily
    output            a folder that keeps what is scored, item by item; the same call goes on where it stopped
    routers           a checkpoint (folder or hub id), LayerRouters, or another policy with a budget
    budgets           shares of the L visits, each in (0, 1]; by default `contenders.BUDGETS`, of these what the routers
                      are calibrated for
    static            criteria ("block-influence", "cka"), files of static policies, or such policies
    random_masks      masks drawn for each size, whose mean is reported
    oracle            report what the best path of each item reaches, of all that were scored for it within a budget
    graders           of free answers: one, or one for each task; see `drllm_fast.search.grading`
    seed              of random masks and of the bootstrap, which draws `samples` times
    together          items scored side by side; max_tokens of a forward at its widest
    name              of the model, for the report; its own by default

    Raises TypeError or ValueError for bad arguments, an output of another model or precision, and prompts longer than
    the model's positions; OSError for files; all before anything is scored, but for the prompts' lengths.
    """
    items = list(items)
    graders = _graders(items, graders)
    layers = len(decoder_of(unwrap(model)).layers)
    _check(items, together, random_masks, samples)
    compared = routers is not None or bool(static) or random_masks > 0
    if not compared and (budgets is not None or oracle):
        raise ValueError("budgets and the oracle need something to compare: give routers, static or random masks")
    for budget in budgets or ():
        skipped_blocks(budget, layers)
    rankings(static, model)
    if isinstance(routers, (str, PathLike)):
        from drllm_fast.routers import LayerRouters

        routers = LayerRouters.from_pretrained(routers)
    if hasattr(routers, "bind"):
        routers.bind(model)
    if budgets is None and compared:
        budgets = _usual_budgets(routers)
    budgets = list(dict.fromkeys(budgets or ()))
    if compared and not budgets:
        raise ValueError("no budgets; give one or more shares of the layers, such as 0.9, or None for the usual ones")
    evaluator = PathEvaluator(model, tokenizer, max_tokens=max_tokens)
    dtype = str(evaluator.decoder.get_input_embeddings().weight.dtype).removeprefix("torch.")
    results = Results(
        None if output is None else Path(output),
        fingerprint=fingerprint.fingerprint(model),
        dtype=dtype,
        check=lambda stored: fingerprint.check(model, stored),
    )
    compete = contenders(
        model, tokenizer, items, budgets=budgets, routers=routers, static=static, random_masks=random_masks,
        seed=seed, max_tokens=max_tokens, progress=progress,
    )  # fmt: skip
    score(evaluator, items, compete, results, graders, together=together, progress=progress)
    report = EvaluationReport(
        figures_of(
            items,
            compete,
            [results.known(item, graders[item.task]) for item in items],
            tokens=[_tokens(tokenizer, item) for item in items],
            oracle=oracle,
            seed=seed,
            samples=samples,
            about={
                "model": name or str(getattr(unwrap(model), "name_or_path", "") or evaluator.decoder.config.model_type),
                "dtype": dtype,
                "layers": layers,
                "graders": {item.task: graders[item.task] for item in items if item.choices is None},
            },
        )
    )
    if output is not None:
        report.write(output)
    return report


def score(
    evaluator: PathEvaluator,
    items: Sequence[Item],
    compete: Sequence[Contender],
    results: Results,
    graders: Mapping[str, str],
    *,
    together: int = TOGETHER,
    progress: bool = False,
) -> None:
    """Add to `results` what is not there yet: the outcome of each item under each distinct path of a contender.

    graders: by task, with version, as `grader_version` writes them.
    KeyboardInterrupt says how many items are done; they are kept.
    """
    todo: list[tuple[Item, list[LayerPath]]] = []
    for number, item in enumerate(items):
        known = results.known(item, graders[item.task])
        paths = list(dict.fromkeys(contender.paths[number] for contender in compete))
        if missing := [path for path in paths if path not in known]:
            todo.append((item, missing))
    done = len(items) - len(todo)
    with tqdm(total=len(items), initial=done, desc="scoring", unit="item", disable=not progress) as bar:
        try:
            for start in range(0, len(todo), together):
                part = todo[start : start + together]
                outcomes = _choosing(evaluator, part) | _writing(evaluator, part, graders)
                results.add([(item, graders[item.task], outcomes[item.task, item.id]) for item, _ in part])
                bar.update(len(part))
                done += len(part)
        except KeyboardInterrupt as error:
            kept = "" if results.file is None else "; the same call goes on from there"
            raise KeyboardInterrupt(f"{done} of {len(items)} items are scored{kept}") from error


def _choosing(
    evaluator: PathEvaluator, part: Sequence[tuple[Item, list[LayerPath]]]
) -> dict[tuple[str, str], dict[LayerPath, Outcome]]:
    choosing = [(item, paths) for item, paths in part if item.choices is not None]
    scored = evaluator.score_many([(item.prompt, item.choices, paths) for item, paths in choosing])
    found = {}
    for (item, paths), rows in zip(choosing, scored, strict=True):
        evaluator.forget(item.prompt, item.choices)
        found[item.task, item.id] = {
            path: Outcome(scores=tuple(row)) for path, row in zip(paths, rows.tolist(), strict=True)
        }
    return found


def _writing(
    evaluator: PathEvaluator, part: Sequence[tuple[Item, list[LayerPath]]], graders: Mapping[str, str]
) -> dict[tuple[str, str], dict[LayerPath, Outcome]]:
    alike: dict[tuple, list[tuple[Item, list[LayerPath]]]] = {}
    for item, paths in part:
        if item.choices is None:
            alike.setdefault((item.max_new_tokens, item.stop), []).append((item, paths))
    found = {}
    for (room, stop), some in alike.items():
        answers = evaluator.greedy_many([(item.prompt, paths) for item, paths in some], room, stop=stop)
        for (item, paths), rows in zip(some, answers, strict=True):
            evaluator.forget(item.prompt)
            kind = graders[item.task].split()[0]
            texts = [cut_at_stop(evaluator.tokenizer.decode(tokens, skip_special_tokens=True), stop) for tokens in rows]
            found[item.task, item.id] = {
                path: Outcome(answer=text, correct=grade(kind, text, item))
                for path, text in zip(paths, texts, strict=True)
            }
    return found


def _usual_budgets(routers: Any) -> Sequence[float]:
    table = getattr(routers, "calibration", None)
    if table is None:
        return BUDGETS
    kept = [budget for budget in BUDGETS if table.budgets[0] <= budget <= table.budgets[-1]]
    return kept or table.budgets[::-1]


def _graders(items: Sequence[Item], graders: str | Mapping[str, str]) -> dict[str, str]:
    """By task, the grader with its version; 'choice' where nothing is to be graded."""
    free = {item.task for item in items if item.choices is None}
    kinds = dict.fromkeys(free, graders) if isinstance(graders, str) else dict(graders)
    if missing := sorted(free - kinds.keys()):
        raise ValueError(f"no grader for the free answers of {', '.join(missing)}; name one in graders")
    for task in free:
        check_grader(kinds[task])
    return {item.task: grader_version(kinds[item.task]) if item.task in free else "choice" for item in items}


def _check(items: Sequence[Item], together: int, random_masks: int, samples: int) -> None:
    if not items:
        raise ValueError("no items to evaluate; give those of a task, as drllm_fast.search.load_task makes them")
    for name, value, least in (("together", together, 1), ("random_masks", random_masks, 0), ("samples", samples, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    seen: set[tuple[str, str]] = set()
    for item in items:
        if (item.task, item.id) in seen:
            raise ValueError(f"two items of {item.task} have the id {item.id!r}; evaluate them one after the other")
        seen.add((item.task, item.id))


def _tokens(tokenizer: Any, item: Item) -> int | None:
    """How many tokens a text to be predicted has."""
    if measure_of(item) != PERPLEXITY:
        return None
    return len(encode_pair(tokenizer, item.prompt, item.choices[0])[1])
