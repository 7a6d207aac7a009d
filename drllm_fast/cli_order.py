"""`drllm-fast order`: in which order the blocks of a model are best left out, for prompts of one kind."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import typer

from drllm_fast.cli_models import SMOLLM2, Dtype, check_model, find_device, load_model
from drllm_fast.cli_train import check_output, going_on

WORK = "measuring"  # folder in the output: what was measured
STATIC = "static.json"

PROMPTS, MEASURING, RUN = "The prompts", "The measuring", "How it runs"


def order(
    model: Annotated[str, typer.Option(help=f"Model folder or hub id; the bundled one: {SMOLLM2}.")],
    task: Annotated[
        list[str],
        typer.Option(
            help="Prompts of one kind: task file, text:FILE, sentences:FILE, synth_arith, hf:DATASET; may be repeated."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the order; the same command goes on where it stopped.")],
    kind: Annotated[str | None, typer.Option(help="Name of the kind; default: that of the folder.")] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Prompts of each task to measure, at even distances.", rich_help_panel=PROMPTS)
    ] = 100,
    read: Annotated[
        int | None,
        typer.Option(
            min=1, help="Prompts of each task for routers to read; default: all of them.", rich_help_panel=PROMPTS
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(min=0, help="Solved examples before a question; default: the form's.", rich_help_panel=PROMPTS),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the chat template.", rich_help_panel=PROMPTS)
    ] = False,
    label_weight: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="0: near the dense model, no labels needed; 1: the right answer alone.",
            rich_help_panel=MEASURING,
        ),
    ] = 0.0,
    skips: Annotated[
        int, typer.Option(min=1, help="Blocks to leave out, at most.", rich_help_panel=MEASURING)
    ] = 9,
    repeats: Annotated[int, typer.Option(min=0, help="Blocks to repeat, at most.", rich_help_panel=MEASURING)] = 3,
    beam: Annotated[
        int, typer.Option(min=1, help="Sequences of blocks that are followed.", rich_help_panel=MEASURING)
    ] = 2,
    pool: Annotated[
        int | None,
        typer.Option(
            min=1, help="Try only so many blocks, the cheapest alone; default: all.", rich_help_panel=MEASURING
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the prompts.", rich_help_panel=RUN)] = 0,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a forward of the model.", rich_help_panel=RUN)
    ] = 8192,
    dtype: Annotated[Dtype, typer.Option(help="auto is the checkpoint's own.", rich_help_panel=RUN)] = Dtype.auto,
    device: Annotated[
        str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...", rich_help_panel=RUN)
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.", rich_help_panel=RUN)] = None,
) -> None:  # fmt: skip
    """Find by measuring which blocks prompts of one kind can best do without, one after the other.

    Writes order.json, for drllm-fast train --orders, and static.json, the same as a policy for all prompts.
    """
    check_model(model)
    where = find_device(device)
    check_output(output, WORK, "measuring")
    kind = output.resolve().name if kind is None else kind

    import torch

    from drllm_fast.search.tasks import evenly, load_task
    from drllm_fast.search.tokens import encode_context
    from drllm_fast.training.block_order import BlockOrder, check_kind

    check_kind(kind)
    if threads:
        torch.set_num_threads(threads)
    loaded, tokenizer = load_model(model, dtype, where)
    if chat and not tokenizer.chat_template:
        raise ValueError(f"--chat: the tokenizer of {model} has no chat template; use --no-chat")
    measured, prompts = [], []
    for spec in dict.fromkeys(task):
        items = load_task(spec, tokenizer=tokenizer if chat else None, chat=chat, shots=shots, seed=seed)
        measured += evenly(items, limit)
        prompts += [
            tuple(encode_context(tokenizer, item.prompt, choices=item.choices is not None))
            for item in evenly(items, read)
        ]
    random.Random(seed).shuffle(measured)  # the first of them are to be a fair sample
    typer.echo(f"measuring {len(measured)} prompts of the kind {kind}; the order goes to {output}", err=True)
    found = measure(
        loaded, tokenizer, measured, output, label_weight=label_weight, skips=skips, repeats=repeats, beam=beam,
        pool=pool, max_tokens=max_tokens,
    )  # fmt: skip

    from drllm_fast.fingerprint import fingerprint
    from drllm_fast.routers import model_name

    made = BlockOrder(
        kind=kind,
        model=model_name(loaded),
        fingerprint=fingerprint(loaded),
        tasks=tuple(Path(spec).name for spec in dict.fromkeys(task)),
        label_weight=label_weight,
        measured=len(measured),
        prompts=tuple(dict.fromkeys(prompts)),
        **found,
    )
    made.static().save(output / STATIC)
    made.save(output)
    _show(made)
    typer.echo(f"the order is in {output}, as a policy in {output / STATIC}", err=True)


def measure(
    model: Any,
    tokenizer: Any,
    items: list[Any],
    output: Path,
    *,
    label_weight: float,
    skips: int,
    repeats: int,
    beam: int,
    pool: int | None,
    max_tokens: int,
) -> dict[str, tuple]:
    """The sequences of `BlockOrder` and their costs; what is measured is kept in the output."""
    from drllm_fast.router_reference import REPEAT, SKIP
    from drllm_fast.search.evaluator import PathEvaluator
    from drllm_fast.training.elimination import PathCosts, eliminate

    work = output / WORK
    work.mkdir(parents=True, exist_ok=True)
    evaluator = PathEvaluator(model, tokenizer, max_tokens=max_tokens)
    found: dict[str, tuple] = {}
    with going_on(work):
        costs = PathCosts(evaluator, items, label_weight=label_weight, file=work / "paths.jsonl")
        for name, to, length in (("skip", SKIP, skips), ("repeat", REPEAT, repeats)):
            blocks, way = eliminate(
                costs, num_layers=evaluator.num_layers, to=to, length=length, count=len(items), beam=beam, pool=pool
            )
            found[f"{name}s"], found[f"{name}_costs"] = tuple(blocks), tuple(way)
    return found


def _show(made: Any) -> None:
    from rich import box
    from rich.table import Table

    from drllm_fast.report import stdout_console

    table = Table(title=f"Order of blocks, {made.kind}", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("layers run", "block", "nats"):
        table.add_column(column, justify="right")
    layers = made.num_layers
    for number, (block, cost) in enumerate(zip(made.skips, made.skip_costs, strict=True), 1):
        table.add_row(f"{1 - number / layers:.1%}", f"skip {block}", f"{cost:.4f}")
    for number, (block, cost) in enumerate(zip(made.repeats, made.repeat_costs, strict=True), 1):
        table.add_row(f"{1 + number / layers:.1%}", f"repeat {block}", f"{cost:.4f}")
    stdout_console().print(table)
