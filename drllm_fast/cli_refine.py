"""`drllm-fast refine`: from a checkpoint of routers to one whose routers go together, with a table of budgets."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from drllm_fast.cli_calibrate import parse_budgets
from drllm_fast.cli_models import SMOLLM2, Dtype, check_model, find_device, load_model
from drllm_fast.cli_train import REPORT, TrackerKind, check_output, going_on, write_report

WORK = "refining"  # folder in the output: the state of the refinement


class Reward(str, Enum):
    kl = "kl"
    margin = "margin"
    loglik = "loglik"


PROMPTS, REFINEMENT, RUN = "The prompts", "The refinement", "How it runs"


def refine(
    model: Annotated[str, typer.Option(help=f"Model folder or hub id; the bundled one: {SMOLLM2}.")],
    routers: Annotated[str, typer.Option(help="Router checkpoint to begin with: folder, bundled name or hub id.")],
    task: Annotated[
        list[str],
        typer.Option(help="Task file, text:FILE, sentences:FILE, synth_arith or hf:DATASET; may be repeated."),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder of the new checkpoint; the same command goes on where it stopped.")
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first so many prompts of each task.", rich_help_panel=PROMPTS)
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(min=0, help="Solved examples before a question; default: the form's.", rich_help_panel=PROMPTS),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the chat template.", rich_help_panel=PROMPTS)
    ] = False,
    validation: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the prompts that is held out.", rich_help_panel=PROMPTS)
    ] = 0.1,
    reward: Annotated[
        Reward,
        typer.Option(
            help="kl: near the dense model, no labels needed; margin: right choice against the others; loglik.",
            rich_help_panel=REFINEMENT,
        ),
    ] = Reward.kl,
    budgets: Annotated[
        str, typer.Option(help="Shares of the dense model's blocks to serve.", rich_help_panel=REFINEMENT)
    ] = "0.8,0.9,0.95",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimiser.", rich_help_panel=REFINEMENT)] = 400,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts a step.", rich_help_panel=REFINEMENT)] = 16,
    samples: Annotated[int, typer.Option(min=2, help="Paths drawn for each.", rich_help_panel=REFINEMENT)] = 8,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of AdamW.", rich_help_panel=REFINEMENT)] = 1e-4,
    temperature: Annotated[
        float, typer.Option(min=1e-3, help="Of the draws; low: near the decisions.", rich_help_panel=REFINEMENT)
    ] = 1.0,
    anchor: Annotated[
        float, typer.Option(min=0, help="How much the first routers hold back.", rich_help_panel=REFINEMENT)
    ] = 0.01,
    every: Annotated[int, typer.Option(min=1, help="Steps between two measurements.", rich_help_panel=REFINEMENT)] = 50,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of split, order and draws.", rich_help_panel=REFINEMENT)
    ] = 0,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a forward of the model.", rich_help_panel=RUN)
    ] = 8192,
    dtype: Annotated[Dtype, typer.Option(help="auto is the checkpoint's own.", rich_help_panel=RUN)] = Dtype.auto,
    device: Annotated[
        str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...", rich_help_panel=RUN)
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.", rich_help_panel=RUN)] = None,
    tracker: Annotated[
        TrackerKind,
        typer.Option(
            help="Where figures go; auto: tensorboard or trackio if installed, else the console.", rich_help_panel=RUN
        ),
    ] = TrackerKind.auto,
) -> None:
    """Refine trained routers by the paths that they choose themselves, at several budgets, and calibrate them.

    Paths are drawn from the routers, and the frozen model says what each is worth. What is kept are the best routers on
    the prompts held out: the given ones, if no others were better.
    """
    from drllm_fast.training.refine_config import RefineConfig

    check_model(model)
    config = RefineConfig(
        reward=reward.value, budgets=tuple(parse_budgets(budgets)), steps=steps, batch_size=batch_size, samples=samples,
        temperature=temperature, learning_rate=lr, anchor=anchor, every=every, validation=validation, seed=seed,
    )  # fmt: skip
    where = find_device(device)
    check_output(output, WORK, "refinement")

    from drllm_fast.search.tasks import load_rows, load_task

    rows = {spec: load_rows(spec, seed=seed) for spec in task}

    import torch

    from drllm_fast.routers import LayerRouters

    if threads:
        torch.set_num_threads(threads)
    found = LayerRouters.from_pretrained(routers)
    loaded, tokenizer = load_model(model, dtype, where)
    if chat and tokenizer.chat_template is None:
        raise ValueError(f"--chat: the tokenizer of {model} has no chat template; use --no-chat")
    items, units = [], []
    for spec, some in rows.items():
        documents = {row["id"]: row.get("document", row["id"]) for row in some}
        items += load_task(
            spec, rows=some, tokenizer=tokenizer if chat else None, chat=chat, shots=shots, limit=limit, seed=seed
        )
        units += [f"{spec}/{documents[item.id]}" for item in items[len(units) :]]
    typer.echo(f"{len(items)} prompts from {', '.join(rows)}; the routers go to {output}", err=True)
    run_refinement(
        loaded, tokenizer, found, items, output, units=units, config=config, tracker=tracker.value,
        max_tokens=max_tokens,
        about={"model": Path(model).name, "routers": Path(routers).name, "tasks": [Path(spec).name for spec in rows]},
    )  # fmt: skip


def run_refinement(
    model: Any,
    tokenizer: Any,
    routers: Any,
    items: list[Any],
    output: Path,
    *,
    units: list[str],
    config: Any,
    about: dict[str, Any],
    tracker: str,
    max_tokens: int,
) -> None:
    """Refine and calibrate `routers`; write the checkpoint and `report.json` into `output`, and print the tables.

    about  what the report says beside its figures, fit for JSON
    """
    from drllm_fast.training.refine import refine
    from drllm_fast.training.trackers import make_tracker

    (output / WORK).mkdir(parents=True, exist_ok=True)
    with going_on(output / WORK), make_tracker(tracker, output) as log:
        try:
            report = refine(
                model, tokenizer, routers, items, units=units, config=config, folder=output / WORK, tracker=log,
                max_tokens=max_tokens,
            )  # fmt: skip
        except FloatingPointError as error:
            raise ValueError(str(error)) from error
        if routers.calibration is None:
            _calibrate(model, tokenizer, routers, items, config.budgets, max_tokens)
        routers.save_pretrained(output)
        table = routers.calibration
        write_report(
            output / REPORT,
            about
            | {
                "prompts": len(items),
                "held_out": [f"{items[i].task}/{items[i].id}" for i in report.validation],
                "calibration": None if table is None else table.to_dict(),
                "refinement": report.to_dict(),
            },
        )
    typer.echo(report.text())
    typer.echo(f"the routers are in {output}, the report in {output / REPORT}", err=True)


def _calibrate(
    model: Any, tokenizer: Any, routers: Any, items: list[Any], budgets: tuple[float, ...], max_tokens: int
) -> None:
    """A table of these budgets, and of those of a table by default, on all prompts."""
    from drllm_fast.search.tokens import encode_context
    from drllm_fast.training.calibrate import BUDGETS, calibrate

    prompts = [encode_context(tokenizer, item.prompt, choices=item.choices is not None) for item in items]
    groups = [item.task for item in items]
    try:
        routers.calibration = calibrate(
            model, routers, prompts, budgets=sorted({*BUDGETS, *budgets}), groups=groups, max_tokens=max_tokens
        )
    except ValueError as error:  # a refinement is worth more than its table
        typer.echo(f"the routers have no table of budgets: {error}", err=True)
