"""`drllm-fast calibrate`: the table of budgets of a router checkpoint, and its guard."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from drllm_fast.cli_models import SMOLLM2, Dtype, check_model, find_device, load_model

STEP = 0.05  # of a range of budgets

PROMPTS, RUN = "The prompts", "How it runs"


def calibrate(
    model: Annotated[str, typer.Option(help=f"Model folder or hub id; the bundled one: {SMOLLM2}.")],
    routers: Annotated[str, typer.Option(help="Router checkpoint of this model: folder, bundled name or hub id.")],
    task: Annotated[
        list[str],
        typer.Option(
            help="Prompts like those to be served, as for drllm-fast search (FILE.jsonl, text:FILE.txt, synth_arith, "
            "hf:NAME); may be repeated."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the calibrated checkpoint; default: the one of --routers, in place.")
    ] = None,
    budgets: Annotated[
        str, typer.Option(help=f"0.8,0.9,1 or 0.5..1.1 (in steps of {STEP}): shares of the dense model's blocks.")
    ] = "0.5..1.1",
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="How far a measured share may be from its budget.")
    ] = 0.005,
    margin: Annotated[
        float | None,
        typer.Option(min=0, help="By how many logits skip or repeat must beat execute; default: the checkpoint's own."),
    ] = None,
    guard: Annotated[
        bool, typer.Option("--guard/--no-guard", help="Run every block once for prompts unlike these.")
    ] = True,
    guard_prototypes: Annotated[int, typer.Option(min=1, help="Kinds of prompts that the guard knows.")] = 32,
    guard_quantile: Annotated[
        float, typer.Option(min=0, max=1, help="Share of these prompts that the guard lets pass.")
    ] = 0.99,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many prompts of each task, at even distances.", rich_help_panel=PROMPTS),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(min=0, help="Solved examples before a question; default: the form's.", rich_help_panel=PROMPTS),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the chat template.", rich_help_panel=PROMPTS)
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**63 - 1, help="Of drawn examples, of synth_arith and of the guard.", rich_help_panel=PROMPTS
        ),
    ] = 0,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a forward of the model.", rich_help_panel=RUN)
    ] = 8192,
    dtype: Annotated[Dtype, typer.Option(help="auto is the checkpoint's own.", rich_help_panel=RUN)] = Dtype.auto,
    device: Annotated[
        str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...", rich_help_panel=RUN)
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.", rich_help_panel=RUN)] = None,
) -> None:
    """Find the penalty that keeps each budget, fit the guard, and write both into the checkpoint.

    Two thirds of the prompts are measured; the table that is printed is of the others.
    """
    wanted = parse_budgets(budgets)
    if not tolerance:
        raise ValueError("--tolerance must be above 0; a share of finitely many prompts meets no budget exactly")
    if guard and not guard_quantile:
        raise ValueError("--guard-quantile must be above 0; with --no-guard no prompt is guarded")
    check_model(model)
    where = find_device(device)
    target = check_target(routers, output)

    from drllm_fast.routers import LayerRouters

    policy = LayerRouters.from_pretrained(routers)
    card = str(policy.generate_model_card())
    policy.margin = policy.margin if margin is None else margin

    import torch

    if threads:
        torch.set_num_threads(threads)
    loaded, tokenizer = load_model(model, dtype, where)
    if chat and not tokenizer.chat_template:
        raise ValueError(f"--chat: the tokenizer of {model} has no chat template; use --no-chat")
    policy.bind(loaded)
    tasks = dict.fromkeys(task)
    parts = read_prompts(list(tasks), tokenizer, limit=limit, shots=shots, chat=chat, seed=seed)
    run_calibration(
        loaded,
        policy,
        *parts,
        wanted,
        tolerance=tolerance,
        guard={"prototypes": guard_prototypes, "quantile": guard_quantile, "seed": seed} if guard else None,
        max_tokens=max_tokens,
    )
    save(policy, target, card)
    typer.echo(f"the calibrated routers are in {target}", err=True)


def parse_budgets(text: str) -> list[float]:
    """'0.8,0.9' or '0.5..1.1', in steps of STEP, as a rising list. ValueError for anything else."""
    try:
        first, dots, last = text.partition("..")
        if dots:
            low, high = float(first), float(last)
            count = round((high - low) / STEP + 1e-9)
            found = [round(low + STEP * i, 6) for i in range(count + 1) if low + STEP * i <= high + 1e-9]
        else:
            found = sorted({float(part) for part in text.split(",")})
    except (ValueError, OverflowError):  # of infinity, too
        found = []
    if not found or not all(0 < budget < 2 for budget in found):
        raise ValueError(f"--budgets {text}: write 0.8,0.9,1 or 0.5..1.1, each above 0 and below 2")
    return found


def check_target(routers: str, output: Path | None) -> Path:
    """The folder to write into. ValueError for one that holds something else."""
    from drllm_fast.router_files import CONFIG

    if output is None and not os.path.isdir(routers):
        raise ValueError(f"--routers {routers} is no folder that could be written to; give --output")
    output = Path(routers) if output is None else output
    if output.is_file():
        raise ValueError(f"--output {output} is a file; give a folder")
    if output.is_dir() and not (output / CONFIG).is_file() and (found := sorted(os.listdir(output))):
        raise ValueError(
            f"--output {output} is not empty and no router checkpoint: it has {', '.join(found[:5])}. Give a new folder"
        )
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OSError(f"cannot write to {there}; make it a writable folder, or give another --output")
    return output


Prompts = tuple[list[list[int]], list[str]]  # token ids, and the task of each


def read_prompts(
    tasks: Sequence[str], tokenizer: Any, *, limit: int | None, shots: int | None, chat: bool, seed: int
) -> tuple[Prompts, Prompts]:
    """The prompts to measure, and those to check what was found: about a third, by a hash of a row's id, or of the
    document that it is of. Both are of every task; ValueError where a task is too small for that."""
    from drllm_fast.search.tasks import evenly, load_rows, load_task
    from drllm_fast.search.tokens import encode_context

    measured: Prompts = [], []
    held_out: Prompts = [], []
    for spec in tasks:
        rows = load_rows(spec, seed=seed)
        items = load_task(spec, rows=rows, tokenizer=tokenizer if chat else None, chat=chat, shots=shots, seed=seed)
        items = evenly(items, limit)
        units = {row["id"]: row.get("document", row["id"]) for row in rows}
        held = [_held_out(units[item.id]) for item in items]
        if all(held) or not any(held):
            raise ValueError(
                f"{spec} has {len(items)} prompts, of too few rows or documents to hold a third of them out; give more"
            )
        for item, apart in zip(items, held, strict=True):
            prompts, names = held_out if apart else measured
            prompts.append(encode_context(tokenizer, item.prompt, choices=item.choices is not None))
            names.append(item.task)
    return measured, held_out


def _held_out(name: str) -> bool:
    # Not the hash by which a task has parts for train and validation: a part is parted once more.
    return hashlib.blake2b(name.encode(), digest_size=2, person=b"calibrate").digest()[0] % 3 == 2


def run_calibration(
    model: Any,
    routers: Any,
    measured: Prompts,
    held_out: Prompts,
    budgets: Sequence[float],
    *,
    tolerance: float,
    guard: dict[str, Any] | None,
    max_tokens: int,
) -> None:
    """Give `routers` a guard and a table made from `measured`, and print what they keep on `held_out`.

    guard  arguments of `fit_guard`; None: no guard
    """
    from drllm_fast.search.interrupts import Interrupts
    from drllm_fast.training.calibrate import calibrate, fit_guard

    with Interrupts():
        prompts, groups = measured
        routers.guard = None if guard is None else fit_guard(model, prompts, max_tokens=max_tokens, **guard)
        routers.calibration = calibrate(
            model, routers, prompts, budgets=budgets, tolerance=tolerance, groups=groups, max_tokens=max_tokens
        )
        _report(model, routers, *held_out, max_tokens)
    if left_out := routers.calibration.source["left_out"]:
        typer.echo(
            f"left out, for no penalty keeps them: {', '.join(f'{budget:g}' for budget in left_out)}. The share jumps "
            "there, or is out of reach because of guarded prompts",
            err=True,
        )


def _report(model: Any, routers: Any, prompts: list[list[int]], tasks: list[str], max_tokens: int) -> None:
    """Print the table: asked budgets, penalties, and the shares that are kept on these prompts."""
    import torch
    from rich import box
    from rich.table import Table

    from drllm_fast.paths import route_paths
    from drllm_fast.report import stdout_console
    from drllm_fast.training.calibrate import prompt_means

    names = sorted(set(tasks))
    rows = {name: [i for i, task in enumerate(tasks) if task == name] for name in names}
    table = Table(title=f"Shares kept on {len(prompts)} prompts held out", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("budget", "penalty", "kept", *(names if len(names) > 1 else ())):
        table.add_column(column, justify="right")
    guarded = torch.zeros(len(prompts), dtype=torch.bool)
    if routers.guard is not None:
        means = prompt_means(model, prompts, max_tokens=max_tokens)
        guarded = routers.guard.to(means.device).unlike(means)
    try:
        for budget, penalty in zip(routers.calibration.budgets, routers.calibration.penalties, strict=True):
            routers.budget = budget
            shares = route_paths(model, prompts, routers, max_tokens=max_tokens).double().mean(dim=1)
            each = [shares, *(shares[rows[name]] for name in names if len(names) > 1)]
            table.add_row(f"{budget:g}", f"{penalty:.4g}", *(f"{share.mean():.3f}" for share in each))
    finally:
        routers.budget = None
    console = stdout_console()
    console.print(table)
    by_task = "".join(f", {guarded[rows[name]].double().mean():.1%} of {name}" for name in names if len(names) > 1)
    if routers.guard is not None:
        console.print(f"guarded (every block once): {guarded.double().mean():.1%}{by_task}")


def save(routers: Any, folder: Path, card: str) -> None:
    """Write the checkpoint into the folder, each file at once or not at all; a card README.md stays as it is, but for
    one that is `card`, as it was generated before."""
    from drllm_fast.atomic import PREFIX, explained, written
    from drllm_fast.router_files import CONFIG, WEIGHTS

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explained(error, folder) from error
    with tempfile.TemporaryDirectory(prefix=PREFIX) as made:
        routers.save_pretrained(made)
        own = folder / "README.md"
        names = [WEIGHTS, CONFIG]
        if routers.guard is None and (folder / CONFIG).exists():
            names.reverse()  # at no moment does the config ask for a guard that is not there
        if not own.exists() or own.read_text(encoding="utf-8").strip() == card.strip():
            names.append(own.name)
        for name in names:
            with written(folder / name) as file:
                file.write((Path(made) / name).read_bytes())
