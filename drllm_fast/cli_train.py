"""`drllm-fast train`: from stored paths to a checkpoint of routers and its report."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from drllm_fast.cli_models import SMOLLM2, Dtype, check_model, find_device, load_model

WORK = "training"  # folder in the output: the windows and the state of the fit
REPORT = "report.json"
STATIC = "prices.json"  # the order of blocks that all prompts share, to compare with: a static policy


class Targets(str, Enum):
    best = "best"
    soft = "soft"


class Balance(str, Enum):
    effective = "effective"
    none = "none"


class Robust(str, Enum):
    none = "none"
    cvar = "cvar"


class WindowDtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class TrackerKind(str, Enum):
    auto = "auto"
    none = "none"
    console = "console"
    tensorboard = "tensorboard"
    trackio = "trackio"


EXAMPLES, PRICES, FIT, RUN = "The examples", "Learning prices", "The fit", "How it runs"


def train(
    model: Annotated[str, typer.Option(help=f"Model folder or hub id; the bundled one: {SMOLLM2}.")],
    output: Annotated[
        Path, typer.Option(help="Folder of the router checkpoint; the same command goes on where it stopped.")
    ],
    paths: Annotated[
        list[Path] | None,
        typer.Option(help="Learn the paths of this folder, which drllm-fast search wrote; may be repeated."),
    ] = None,
    prices: Annotated[
        list[Path] | None,
        typer.Option(
            help="Or learn what blocks cost, from a folder of drllm-fast search --method spread --reward kl; may be "
            "repeated."
        ),
    ] = None,
    orders: Annotated[
        list[Path] | None,
        typer.Option(
            help="Or learn which kind of prompt needs which blocks, from a folder of drllm-fast order for each "
            "kind; may be repeated."
        ),
    ] = None,
    targets: Annotated[
        Targets,
        typer.Option(
            help="best: the shortest right path; soft: shares among all right paths.", rich_help_panel=EXAMPLES
        ),
    ] = Targets.best,
    temperature: Annotated[
        float,
        typer.Option(min=1e-3, help="soft: a path weighs exp(-blocks run / temperature).", rich_help_panel=EXAMPLES),
    ] = 1.0,
    only_kept: Annotated[
        bool,
        typer.Option(
            "--only-kept/--all",
            help="Only prompts for which a better path was found; --all: the others run all blocks.",
            rich_help_panel=EXAMPLES,
        ),
    ] = True,
    levels: Annotated[str | None, typer.Option(help="Only these levels: 1-2 or 1,4.", rich_help_panel=EXAMPLES)] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first so many examples of each folder.", rich_help_panel=EXAMPLES)
    ] = None,
    skips: Annotated[
        int, typer.Option(min=1, help="Blocks that may be left out, at most.", rich_help_panel=PRICES)
    ] = 9,
    repeats: Annotated[
        int, typer.Option(min=0, help="Blocks that may be repeated, at most.", rich_help_panel=PRICES)
    ] = 3,
    lengths: Annotated[
        int,
        typer.Option(min=1, help="Paths of different lengths that each prompt is read along.", rich_help_panel=PRICES),
    ] = 3,
    validation: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the examples that is held out.", rich_help_panel=EXAMPLES)
    ] = 0.1,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the examples.", rich_help_panel=FIT)] = 25,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts a step.", rich_help_panel=FIT)] = 16,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of AdamW.", rich_help_panel=FIT)] = 1e-3,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of AdamW.", rich_help_panel=FIT)] = 0.01,
    warmup: Annotated[
        int, typer.Option(min=0, help="Steps until the full rate; at most a quarter of all.", rich_help_panel=FIT)
    ] = 500,
    gamma: Annotated[
        float, typer.Option(min=0, help="Of the focal loss; 0: cross-entropy.", rich_help_panel=FIT)
    ] = 2.0,
    balance: Annotated[
        Balance, typer.Option(help="effective: rare classes weigh more.", rich_help_panel=FIT)
    ] = Balance.effective,
    beta: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Of the class weights; as published 0.999. Default: 1 - 1 / labels.", rich_help_panel=FIT
        ),
    ] = None,
    logit_adjustment: Annotated[
        float, typer.Option(min=0, help="tau of the logit adjustment; 0: none.", rich_help_panel=FIT)
    ] = 0.0,
    robust: Annotated[
        Robust, typer.Option(help="cvar: draw prompts of the worst tasks and levels more often.", rich_help_panel=FIT)
    ] = Robust.none,
    cvar: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the groups that are the worst.", rich_help_panel=FIT)
    ] = 0.3,
    windows: Annotated[
        int, typer.Option(min=1, help="Windows that a prompt is pooled into, at most.", rich_help_panel=FIT)
    ] = 8,
    router_size: Annotated[int, typer.Option(min=1, help="Hidden units of a router.", rich_help_panel=FIT)] = 128,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of weights, split and order.", rich_help_panel=FIT)
    ] = 0,
    windows_file: Annotated[
        Path | None,
        typer.Option(
            help="Where the windows are kept, for trainings of the same examples to share; default: in the output.",
            rich_help_panel=RUN,
        ),
    ] = None,
    windows_dtype: Annotated[
        WindowDtype, typer.Option(help="Of the stored windows; bfloat16 takes half the disk.", rich_help_panel=RUN)
    ] = WindowDtype.float32,
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
            help="Where figures of the epochs go; auto: tensorboard or trackio if installed, else the console.",
            rich_help_panel=RUN,
        ),
    ] = TrackerKind.auto,
) -> None:
    """Train routers on paths or prices that searches found, or on orders of blocks, and write them as a checkpoint.

    The frozen model reads every prompt once, along its path; the epochs then run on what the routers saw.
    """
    if sum(map(bool, (paths, prices, orders))) != 1:
        raise ValueError("give --paths FOLDER or --prices FOLDER of a search, or --orders FOLDER; one of the three")
    from drllm_fast.search.manifest import read
    from drllm_fast.training.block_order import BlockOrder, order_lesson
    from drllm_fast.training.fit_config import FitConfig

    check_model(model)
    config = FitConfig(
        epochs=epochs, batch_size=batch_size, learning_rate=lr, weight_decay=weight_decay, warmup_steps=warmup,
        gamma=gamma, balance=balance.value, beta=beta, logit_adjustment=logit_adjustment, robust=robust.value,
        cvar=cvar, validation=validation, seed=seed,
    )  # fmt: skip
    where = find_device(device)
    folders = paths or prices or orders
    for folder in folders:
        (BlockOrder.load if orders else read)(folder)  # what can be said without the model
    check_output(output)

    import torch

    from drllm_fast.routers import LayerRouters
    from drllm_fast.training.examples import load_examples

    if threads:
        torch.set_num_threads(threads)
    loaded, tokenizer = load_model(model, dtype, where)
    routers = LayerRouters.for_model(
        loaded, router_size=router_size, windows=windows, generator=torch.Generator().manual_seed(seed)
    ).to(where)
    about = {"model": routers.base_model["name"], "paths": [folder.name for folder in folders]}
    run = functools.partial(
        run_training,
        loaded,
        routers,
        output=output,
        config=config,
        tracker=tracker.value,
        windows_file=windows_file,
        windows_dtype=getattr(torch, windows_dtype.value),
        max_tokens=max_tokens,
    )
    if paths:
        examples = load_examples(
            paths, tokenizer=tokenizer, model=loaded, targets=targets.value, temperature=temperature,
            only_kept=only_kept, levels=levels, limit=limit,
        )  # fmt: skip
        typer.echo(f"{len(examples)} examples from {', '.join(map(str, paths))}; routers go to {output}", err=True)
        run(examples, about=about | {"learnt": f"{targets.value} paths"})
        return
    if orders:
        lesson = order_lesson(
            loaded, [BlockOrder.load(folder) for folder in orders], lengths=lengths, limit=limit, seed=seed
        )
        typer.echo(f"{len(lesson.examples)} examples of {len(orders)} kinds; routers go to {output}", err=True)
    else:
        lesson = learn_prices(
            loaded, tokenizer, prices, output, skips=skips, repeats=repeats, lengths=lengths, limit=limit, seed=seed,
            max_tokens=max_tokens,
        )  # fmt: skip
        lesson.static.save(output / STATIC)
    run(lesson.examples, targets=lesson.places, objective=lesson.objective, about=about | lesson.about)


def learn_prices(model: Any, tokenizer: Any, stores: list[Path], output: Path, **options: Any) -> Any:
    """A `drllm_fast.training.price_lesson.Lesson`, with the windows of the dense paths kept in the output."""
    from drllm_fast.training.price_lesson import price_lesson
    from drllm_fast.training.prices import load_measurements

    measured = load_measurements(stores, tokenizer=tokenizer, model=model, limit=options.pop("limit"))
    typer.echo(
        f"{len(measured.costs)} measured paths of {len(measured.tokens)} prompts; routers go to {output}", err=True
    )
    work = output / WORK
    work.mkdir(parents=True, exist_ok=True)
    with going_on(work):
        return price_lesson(model, measured, file=work / "dense.bin", **options)


def run_training(
    model: Any,
    routers: Any,
    examples: list[Any],
    *,
    output: Path,
    config: Any,
    about: dict[str, Any],
    tracker: str,
    windows_file: Path | None,
    windows_dtype: Any,
    max_tokens: int,
    targets: Any = None,
    objective: Any = None,
) -> None:
    """Train `routers` on the examples; write the checkpoint and `report.json` into `output`, and print the table.

    about               what the report says beside its figures, fit for JSON
    targets, objective  as for `fit`; by default the examples' own paths or probabilities are learnt as classes
    """
    from drllm_fast.training.examples import targets_of, training_set_hash
    from drllm_fast.training.fit import fit
    from drllm_fast.training.trackers import make_tracker
    from drllm_fast.training.windows import pool_examples

    work = output / WORK
    work.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    with going_on(work), make_tracker(tracker, output) as log:
        pooled = pool_examples(
            model,
            [example.tokens for example in examples],
            [example.path for example in examples],
            windows=routers.windows,
            max_tokens=max_tokens,
            dtype=windows_dtype,
            file=windows_file or work / "windows.bin",
        )
        pooling = time.perf_counter() - begun
        groups = [example.group for example in examples]
        report = fit(
            routers, pooled, targets_of(examples) if targets is None else targets, groups=groups, objective=objective,
            config=config, folder=work, tracker=log,
        )  # fmt: skip
        routers.training_set = training_set_hash(examples)
        routers.grader = ", ".join(sorted({example.grader for example in examples if example.grader})) or None
        routers.save_pretrained(output)
        write_report(
            output / REPORT,
            about
            | {
                "examples": len(examples),
                "groups": dict(sorted(Counter(groups).items())),
                "held_out": [f"{examples[i].task}/{examples[i].id}" for i in report.validation],
                "training_set": routers.training_set,
                "grader": routers.grader,
                "seconds_windows": pooling,
                "fit": report.to_dict(),
            },
        )
    typer.echo(report.text())
    typer.echo(f"the routers are in {output}, the report in {output / REPORT}", err=True)


def check_output(output: Path, work: str = WORK, of: str = "training") -> None:
    """ValueError unless the folder is new, empty, or of a training, which has the folder `work` in it."""
    if output.is_file():
        raise ValueError(f"--output {output} is a file; give a folder")
    if output.is_dir() and not (output / work).is_dir():
        if found := sorted(os.listdir(output)):
            raise ValueError(
                f"--output {output} is not empty and no output of a {of}: it has {', '.join(found[:5])}. Give a "
                "new folder"
            )


@contextlib.contextmanager
def going_on(work: Path) -> Iterator[None]:
    """Ctrl-C, and SIGTERM, end in a message that says how to go on."""
    from drllm_fast.search.interrupts import Interrupts

    with Interrupts():
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; what was done is kept in {work}, run the same command to go on"
            ) from None


def write_report(file: Path, report: dict[str, Any]) -> None:
    from drllm_fast.atomic import written

    with written(file) as out:
        out.write((json.dumps(report, indent=2) + "\n").encode())
