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
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drllm_fast.cli_calibrate import calibrate
from drllm_fast.cli_eval import evaluate
from drllm_fast.cli_models import SMOLLM2, Dtype, check_model, find_device, load_model
from drllm_fast.cli_order import order
from drllm_fast.cli_policies import POLICY_HELP, Criterion, apply_policy, parse_policy
from drllm_fast.cli_refine import refine
from drllm_fast.cli_search import search
from drllm_fast.cli_serve import serve
from drllm_fast.cli_train import train

if TYPE_CHECKING:
    import torch

    from drllm_fast.stats import RoutingStats

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
    dtype: Annotated[Dtype, typer.Option(help="auto is bfloat16.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of torch; greedy answers do not depend on it.")] = 0,
) -> None:
    """Route ten prompts in one batch on SmolLM2-135M: answers, layer paths, KV memory, and tokens/s beside dense."""
    _check_budget(budget)
    _check_output(output)
    import torch

    from drllm_fast.demo import run_demo

    if threads:
        torch.set_num_threads(threads)
    run_demo(
        budget=budget,
        criterion=criterion.value,
        max_new_tokens=max_new_tokens,
        output=output,
        rounds=rounds,
        seed=seed,
        device=find_device(device),
        dtype=torch.bfloat16 if dtype is Dtype.auto else getattr(torch, dtype.value),
    )


@app.command()
@clean_errors
def generate(
    model: Annotated[str, typer.Option(help=f"Model folder or hub id; {SMOLLM2} is the one of the demo.")],
    policy: Annotated[str, typer.Option(help=POLICY_HELP)],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, readable=True, help="One prompt a line.")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Share of the dense model's blocks, in (0, 1].")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="New tokens for each prompt, at most.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts run together.")] = 32,
    dtype: Annotated[Dtype, typer.Option(help="auto is the checkpoint's own.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")] = "auto",
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; default: if there is one.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy decoding.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write a heat map of the paths: .png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> None:
    """Answer prompts with a routed model and print what each one ran."""
    prompts = list(prompt or [])
    if prompts_file is not None:
        prompts += _read_prompts(prompts_file)
    if not prompts:
        raise typer.BadParameter("give --prompt TEXT (may be repeated) or --prompts-file FILE")
    if any(not text.strip() for text in prompts):
        raise typer.BadParameter("a prompt is empty")
    if budget is not None:
        _check_budget(budget)
    if plot is not None:
        _check_output(plot)
    spec = parse_policy(policy, budget)
    check_model(model)

    import torch

    where = find_device(device)
    loaded, tokenizer = load_model(model, dtype, where)
    if chat is None:
        chat = tokenizer.chat_template is not None
    elif chat and tokenizer.chat_template is None:
        raise ValueError(f"--chat: the tokenizer of {model} has no chat template; use --no-chat")
    layers = loaded.config.get_text_config(decoder=True).num_hidden_layers
    apply_policy(loaded, tokenizer, spec, layers)
    torch.manual_seed(seed)
    answers, stats = _run(loaded, tokenizer, prompts, chat, batch_size, max_new_tokens, temperature)

    plan = stats.plan if stats else torch.ones(len(prompts), layers, dtype=torch.int8)
    if as_json:
        typer.echo(json.dumps(_as_json(model, policy, budget, prompts, answers, plan, stats), ensure_ascii=False))
    else:
        for text, answer in zip(prompts, answers, strict=True):
            typer.echo(f"> {text}\n{answer}\n")
        if stats:
            from drllm_fast.report import stdout_console, summary_table

            stdout_console().print(summary_table(stats, labels=prompts))
    if plot is not None:  # last: the answers are out, whatever becomes of the file
        from drllm_fast.report import plot_plan

        plot_plan(stats or plan, plot, labels=prompts)


app.command()(clean_errors(search))
app.command()(clean_errors(order))
app.command()(clean_errors(train))
app.command()(clean_errors(refine))
app.command()(clean_errors(calibrate))
app.command("eval")(clean_errors(evaluate))
app.command()(clean_errors(serve))


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts-file {path}: no prompt in it; write one a line")
    return prompts


# -- generation
def _run(
    model: Any, tokenizer: Any, prompts: list[str], chat: bool, batch_size: int, max_new_tokens: int, temperature: float
) -> tuple[list[str], RoutingStats | None]:
    """Answers in the order of the prompts, and the stats of all batches (None for the dense model)."""
    from rich.console import Console
    from rich.progress import Progress
    from transformers import StoppingCriteria

    from drllm_fast.stats import RoutingStats

    routed = hasattr(model, "routing")
    answers: list[str] = []
    batches: list[RoutingStats] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        steps = max_new_tokens * -(-len(prompts) // batch_size)
        task = progress.add_task("Generating", total=steps)

        class Tick(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                progress.advance(task)
                return input_ids.new_zeros(len(input_ids), dtype=bool)

        for start in range(0, len(prompts), batch_size):
            texts = prompts[start : start + batch_size]
            if chat:
                chats = [[{"role": "user", "content": text}] for text in texts]
                batch = tokenizer.apply_chat_template(
                    chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
                )
            else:
                batch = tokenizer(texts, padding=True, return_tensors="pt")
            batch = {k: v.to(model.device) for k, v in batch.items() if k in ("input_ids", "attention_mask")}
            if not batch["attention_mask"].any(1).all():
                raise ValueError("the tokenizer makes no token of one of the prompts")
            sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
            out = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=[Tick()],
                **sampling,
            )
            new = out[:, batch["input_ids"].shape[1] :]
            answers += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
            if routed:
                batches.append(model.routing.stats)
            progress.update(task, completed=max_new_tokens * (start // batch_size + 1))
    return answers, RoutingStats.concat(batches) if batches else None


def _as_json(
    model: str,
    policy: str,
    budget: float | None,
    prompts: list[str],
    answers: list[str],
    plan: torch.Tensor,
    stats: RoutingStats | None,
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"prompt": text, "answer": answer, "path": path, "layers_run": sum(path)}
        for text, answer, path in zip(prompts, answers, plan.tolist(), strict=True)
    ]
    nothing = [None] * len(rows)  # of the dense model nothing is counted
    tokens, held = (stats.tokens.tolist(), stats.per_row_kv_bytes.tolist()) if stats else (nothing, nothing)
    for row, count, size in zip(rows, tokens, held, strict=True):
        row |= {"tokens": count, "kv_bytes": size}
    names = ("visits_run", "visits_dense", "share", "kv_bytes", "kv_bytes_dense")
    totals = {name: getattr(stats, name) for name in names} if stats else {**dict.fromkeys(names), "share": 1.0}
    return {"model": model, "policy": policy, "budget": budget, "results": rows, "totals": totals}


def _check_budget(budget: float) -> None:
    if not 0 < budget <= 1:
        raise typer.BadParameter(f"--budget {budget}: a share of the dense model's blocks, above 0 and at most 1")


def _check_output(path: Path) -> None:
    """Before minutes of work, not after."""
    from drllm_fast.report import FORMATS

    if path.suffix.lower() not in FORMATS:
        raise typer.BadParameter(f"{path}: the file name must end in one of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise typer.BadParameter(f"{path}: is a folder; give a file name")
    new = not path.exists()
    try:
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('plotting needs matplotlib: pip install "drllm-fast[plot]"') from error


def main() -> None:
    """Entry point of the command `drllm-fast`."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("drllm-fast: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
