"""The command `drllm-fast`: demo, generate, search, order, train, refine, calibrate, eval, serve, info.

A user's errors are one line on stderr and exit status 2.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from drllm_fast.cli_calibrate import calibrate
from drllm_fast.cli_eval import evaluate
from drllm_fast.cli_generate import generate
from drllm_fast.cli_models import Dtype, bfloat16_units, find_device
from drllm_fast.cli_order import order
from drllm_fast.cli_outputs import check_plot
from drllm_fast.cli_policies import Criterion, check_budget
from drllm_fast.cli_refine import refine
from drllm_fast.cli_search import search
from drllm_fast.cli_serve import serve
from drllm_fast.cli_train import train

app = typer.Typer(
    name="drllm-fast",
    help="Dynamic layer routing for pretrained language models: each prompt runs its own list of blocks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """What a user can cause ends in one message and exit status 2, ctrl-C in 130; a defect keeps its traceback.

    DRLLM_FAST_DEBUG=1 in the environment shows the traceback of every error.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, NotImplementedError, ImportError) as error:
            defect = (getattr(error, "name", None) or "").startswith("drllm_fast")  # a module of our own is missing
            if defect or isinstance(error, BrokenPipeError) or os.environ.get("DRLLM_FAST_DEBUG"):
                raise
            message = str(error).strip() or type(error).__name__
            typer.echo(f"drllm-fast: error: {message}", err=True)
            raise typer.Exit(2) from error
        except RuntimeError as error:
            if not hasattr(error, "failed"):  # units of a search, see `drllm_fast.search.work.UnitsFailed`
                raise
            typer.echo(f"drllm-fast: error: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo(f"drllm-fast: {error}" if str(error) else "drllm-fast: interrupted", err=True)
            raise typer.Exit(130) from error

    return wrapped


def _version(shown: bool) -> None:
    if shown:
        from drllm_fast import __version__

        typer.echo(f"drllm-fast {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@clean_errors
def info(
    as_json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
) -> None:
    """Print what is compiled, which backend runs and why."""
    from drllm_fast.build_info import build_info, build_report

    typer.echo(json.dumps(build_info()) if as_json else build_report())


@app.command()
@clean_errors
def demo(
    budget: Annotated[float, typer.Option(help="Share of the blocks that routers and static path may run.")] = 0.9,
    criterion: Annotated[Criterion, typer.Option(help="How the static policy ranks blocks.")] = (
        Criterion.block_influence
    ),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="New tokens for each prompt.")] = 48,
    output: Annotated[Path, typer.Option(help="Heat map to write: .png, .svg or .pdf.")] = Path("drllm-demo.png"),
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds, after one to warm up.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="auto is bfloat16 where the device has units for it, else float32.")
    ] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of torch; greedy answers do not depend on it.")] = 0,
) -> None:
    """Route ten prompts in one batch on SmolLM2-135M: answers, layer paths, KV memory, and tokens/s beside dense."""
    check_budget(budget)
    check_plot(output)
    import torch

    from drllm_fast.demo import run_demo

    if threads:
        torch.set_num_threads(threads)
    where = find_device(device)
    if dtype is Dtype.auto:
        dtype = Dtype.bfloat16 if bfloat16_units(where) else Dtype.float32
    run_demo(
        budget=budget,
        criterion=criterion.value,
        max_new_tokens=max_new_tokens,
        output=output,
        rounds=rounds,
        seed=seed,
        device=where,
        dtype=getattr(torch, dtype.value),
    )


app.command()(clean_errors(generate))
app.command()(clean_errors(search))
app.command()(clean_errors(order))
app.command()(clean_errors(train))
app.command()(clean_errors(refine))
app.command()(clean_errors(calibrate))
app.command("eval")(clean_errors(evaluate))
app.command()(clean_errors(serve))


def main() -> None:
    """Entry point of the command `drllm-fast`."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("drllm-fast: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
