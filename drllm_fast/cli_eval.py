"""`drllm-fast eval`: accuracy against layers run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from drllm_fast.cli_models import SMOLLM2, Dtype, check_model, find_device, load_model

TASK, COMPARED, RUN = "The tasks", "What is compared", "How it runs"


def evaluate(
    model: Annotated[str, typer.Option(help=f"Model folder or hub id; the bundled one: {SMOLLM2}.")],
    task: Annotated[
        list[str],
        typer.Option(
            help="FILE.jsonl or .jsonl.gz; synth_arith or synth_arith:1-2; text:FILE.txt (its perplexity); each with "
            ":train or :validation for a part of it; hf:NAME, hf:NAME:CONFIG:SPLIT. May be repeated."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the results; the same command goes on where it stopped.")],
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="At most so many prompts of each task, at even distances in its data.", rich_help_panel=TASK
        ),
    ] = None,
    levels: Annotated[str | None, typer.Option(help="Only these levels: 1-2 or 1,4.", rich_help_panel=TASK)] = None,
    shots: Annotated[
        int | None,
        typer.Option(min=0, help="Solved examples before a question; default: the form's.", rich_help_panel=TASK),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(help="Prompt form: question, letters, verbatim, or a task's name.", rich_help_panel=TASK),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the chat template.", rich_help_panel=TASK)
    ] = False,
    drop_unanswered: Annotated[
        bool, typer.Option("--drop-unanswered", help="Leave out rows whose answer is empty.", rich_help_panel=TASK)
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a free answer; default: the form's.", rich_help_panel=TASK)
    ] = None,
    grader: Annotated[
        str,
        typer.Option(
            help="Of free answers: exact, first-word, math-verify, mathruler; auto: what suits each task.",
            rich_help_panel=TASK,
        ),
    ] = "auto",
    routers: Annotated[
        str | None, typer.Option(help="A router checkpoint: folder or hub id.", rich_help_panel=COMPARED)
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Shares of the layers to run; default: 1.0,0.95,0.9,0.85,0.8,0.75, of these what the routers are "
            "calibrated for.",
            rich_help_panel=COMPARED
        ),
    ] = None,
    static: Annotated[
        list[str] | None,
        typer.Option(
            help="Masks that leave out as many blocks for every prompt: block-influence, cka, or a static policy "
            "(.json). May be repeated.",
            rich_help_panel=COMPARED,
        ),
    ] = None,
    random: Annotated[
        int, typer.Option(min=0, help="Random masks for each number of blocks, averaged.", rich_help_panel=COMPARED)
    ] = 0,
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle", help="Show the best path of each prompt, picked by looking at the answer.",
            rich_help_panel=COMPARED,
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**63 - 1, help="Of random masks, intervals, drawn examples and synth_arith.",
            rich_help_panel=RUN,
        ),
    ] = 0,
    together: Annotated[int, typer.Option(min=1, help="Prompts scored side by side.", rich_help_panel=RUN)] = 16,
    dtype: Annotated[Dtype, typer.Option(help="auto is the checkpoint's own.", rich_help_panel=RUN)] = Dtype.auto,
    device: Annotated[
        str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...", rich_help_panel=RUN)
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.", rich_help_panel=RUN)] = None,
) -> None:  # fmt: skip
    """Measure accuracy against layers run: routers at their budgets beside the dense model and masks of the same size.

    For a first look: drllm-fast eval --model smollm2-135m-instruct --task synth_arith:1 --limit 50
    --static block-influence --budgets 0.95,0.9 --output evaluated
    """
    from drllm_fast.search.grading import check_grader
    from drllm_fast.search.tasks import evenly, load_task

    check_model(model)
    wanted = _budgets(budgets)
    _check_compared(routers, static or [], random, budgets, oracle)
    if grader != "auto":
        check_grader(grader)
    where = find_device(device)
    if output.is_file():
        raise ValueError(f"--output {output}: is a file; give a folder")

    import torch

    if threads:
        torch.set_num_threads(threads)
    loaded = load_model(model, dtype, where) if chat else None  # the template is the tokenizer's
    if loaded and not loaded[1].chat_template:
        raise ValueError(f"--chat: the tokenizer of {model} has no chat template; use --no-chat")
    items, graders = [], {}
    for spec in task:
        some = load_task(
            spec, tokenizer=loaded and loaded[1], chat=chat, shots=shots, levels=levels, seed=seed,
            form=form, max_new_tokens=max_new_tokens, drop_unanswered=drop_unanswered,
        )  # fmt: skip
        some = evenly(some, limit)
        _add_graders(graders, spec, some, grader, form, seed)
        items += some
    model_and_tokenizer = loaded or load_model(model, dtype, where)

    from drllm_fast.evaluation import evaluate as run

    report = run(
        *model_and_tokenizer, items, output=output, routers=routers, budgets=wanted, static=static or (),
        random_masks=random, oracle=oracle, graders=graders, seed=seed, together=together,
        name=Path(model).resolve().name if Path(model).is_dir() else model, progress=sys.stderr.isatty(),
    )  # fmt: skip
    typer.echo(report.text())
    files = sorted(str(file) for file in output.glob("report.*"))
    typer.echo(f"{len(items)} prompts in {output / 'results.jsonl'}; the report is in {', '.join(files)}", err=True)
    if importlib.util.find_spec("matplotlib") is None:
        typer.echo('without the picture, which needs matplotlib: pip install "drllm-fast[plot]"', err=True)


def _add_graders(
    graders: dict[str, str], spec: str, items: list[Any], grader: str, form: str | None, seed: int
) -> None:
    """The grader of the free answers of each task, with `auto` the one of its prompt form."""
    from drllm_fast.search.prompts import grader_of
    from drllm_fast.search.tasks import load_rows

    free = {item.id: item.task for item in items if item.choices is None}
    if not free:
        return
    if grader != "auto":
        graders |= dict.fromkeys(free.values(), grader)
        return
    for row in load_rows(spec, seed=seed):
        if (task := free.get(row["id"])) is not None:
            found = grader_of(form or row["form"])
            if graders.setdefault(task, found) != found:
                raise ValueError(
                    f"the answers of {task} want different graders ({graders[task]}, {found}); choose one: --grader"
                )


def _budgets(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--budgets {text}: write shares of the layers, such as 1.0,0.9,0.8") from error
    if not all(0 < budget <= 1 for budget in found):
        raise typer.BadParameter(f"--budgets {text}: each must be above 0 and at most 1, 0.8 for 80 % of the layers")
    return found


def _check_compared(routers: str | None, static: list[str], random: int, budgets: str | None, oracle: bool) -> None:
    """What can be said before anything heavy is loaded."""
    from drllm_fast.influence import CRITERIA
    from drllm_fast.router_files import bundled_routers

    for given in static:
        if given.endswith(".json"):
            if not Path(given).is_file():
                raise typer.BadParameter(f"--static {given}: no such file")
        elif given not in CRITERIA:
            raise typer.BadParameter(f"--static {given}: write {' or '.join(CRITERIA)}, or a static policy's .json")
    known = routers is None or "/" in routers or Path(routers).is_dir() or routers in bundled_routers()
    if not known:
        raise typer.BadParameter(f"--routers {routers}: no such folder; bundled are {', '.join(bundled_routers())}")
    if not (routers or static or random) and (budgets is not None or oracle):
        name = "--oracle" if budgets is None else "--budgets"
        raise typer.BadParameter(f"{name}: nothing to compare; add --routers CHECKPOINT, --static or --random")
