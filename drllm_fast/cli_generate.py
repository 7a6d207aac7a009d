"""The command `drllm-fast generate`: answers to a few prompts, printed, or to a file of them, in a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drllm_fast.cli_models import SMOLLM2, Dtype, check_model, find_device, load_model
from drllm_fast.cli_outputs import check_plot
from drllm_fast.cli_policies import POLICY_HELP, apply_policy, check_budget, parse_policy

if TYPE_CHECKING:
    from drllm_fast.generation.sampling import Sampling
    from drllm_fast.stats import RoutingStats


def generate(
    model: Annotated[str, typer.Option(help=f"Model folder or hub id; {SMOLLM2} is the one of the demo.")],
    policy: Annotated[str, typer.Option(help=POLICY_HELP)],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, readable=True, help="One prompt a line.")
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            exists=True,
            dir_okay=False,
            readable=True,
            help="Prompts as .jsonl or .jsonl.gz: objects with prompt, messages (a chat) or tokens, and if need be id, "
            "max_new_tokens, temperature, top_k, top_p, seed, stop, budget, path.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Answers of --input, .jsonl: a line for each, as it ends. The same command goes on with it."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Field of --input that goes into --output; repeatable.")
    ] = None,
    ordered: Annotated[bool, typer.Option("--ordered", help="Write --output in the order of --input.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin --output anew.")] = False,
    budget: Annotated[float | None, typer.Option(help="Share of the dense model's blocks, in (0, 1].")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="New tokens for each prompt, at most.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts run together.")] = 32,
    dtype: Annotated[Dtype, typer.Option(help="auto is the checkpoint's own.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")] = "auto",
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; default: if there is one.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy decoding.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many tokens alone; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens of this probability together.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends an answer; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling; each prompt draws with one more than that before.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write a heat map of the paths: .png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> None:
    """Answer prompts with a routed model: print the answers and what each ran, or write them to a file."""
    prompts = list(prompt or [])
    if input_file is None:
        _refuse(
            {"--output": output, "--keep": keep, "--ordered": ordered, "--overwrite": overwrite},
            "goes with --input FILE",
        )
        if prompts_file is not None:
            prompts += _read_prompts(prompts_file)
        if not prompts:
            raise typer.BadParameter("give --prompt TEXT (may be repeated), --prompts-file FILE or --input FILE")
        if any(not text.strip() for text in prompts):
            raise typer.BadParameter("a prompt is empty")
    else:
        given = {"--prompt": prompt, "--prompts-file": prompts_file, "--plot": plot, "--json": as_json}
        _refuse(given, "does not go with --input FILE")
        if output is None:
            raise typer.BadParameter("--input FILE needs --output FILE")
    if budget is not None:
        check_budget(budget)
    if plot is not None:
        check_plot(plot)
    spec = parse_policy(policy, budget)
    check_model(model)

    from drllm_fast.generation.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
    )

    def load() -> tuple[Any, Any, bool]:
        """The routed model, its tokenizer, and whether prompts are chats."""
        loaded, tokenizer = load_model(model, dtype, find_device(device))
        template = tokenizer.chat_template is not None
        if chat and not template:
            raise ValueError(f"--chat: the tokenizer of {model} has no chat template; use --no-chat")
        apply_policy(loaded, tokenizer, spec, loaded.config.get_text_config(decoder=True).num_hidden_layers)
        return loaded, tokenizer, template if chat is None else chat

    if input_file is not None:
        from drllm_fast.cli_generate_files import answer_file

        answer_file(
            load, input_file, output, sampling, keep=keep or [], ordered=ordered, overwrite=overwrite,
            batch_size=batch_size, made_of={"policy": policy, "budget": budget, "chat": chat},
            notes={"model": model, "dtype": dtype.value, "device": device},
        )  # fmt: skip
        return
    answers, stats = _run(*load(), prompts, batch_size, sampling)
    if as_json:
        typer.echo(json.dumps(_as_json(model, policy, budget, prompts, answers, stats), ensure_ascii=False))
    else:
        from drllm_fast.report import stdout_console, summary_table

        for text, answer in zip(prompts, answers, strict=True):
            typer.echo(f"> {text}\n{answer}\n")
        stdout_console().print(summary_table(stats, labels=prompts))
    if plot is not None:  # last: the answers are out, whatever becomes of the file
        from drllm_fast.report import plot_plan

        plot_plan(stats, plot, labels=prompts)


def _refuse(options: dict[str, Any], why: str) -> None:
    for name, value in options.items():
        if value:
            raise typer.BadParameter(f"{name} {why}")


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines knows other ends of lines
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts-file {path}: no prompt in it; write one a line")
    return prompts


def _run(
    model: Any, tokenizer: Any, chat: bool, prompts: list[str], batch_size: int, sampling: Sampling
) -> tuple[list[str], RoutingStats]:
    """Answers in the order of the prompts, and what they ran."""
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import Progress

    from drllm_fast.generation.engine import Engine
    from drllm_fast.generation.prompt_rows import PromptRow, encode_rows, engine_options

    rows = [
        PromptRow(f"prompt {number + 1}", number + 1, text, replace(sampling, seed=sampling.seed + number))
        for number, text in enumerate(prompts)
    ]
    tokens = encode_rows(model, tokenizer, rows, chat=chat)
    engine = Engine(model, tokenizer, **engine_options(model, rows, tokens, batch_size))
    progress = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with progress, engine:
        task = progress.add_task("Generating", total=len(rows) * sampling.max_new_tokens)
        requests = [engine.submit(ids, row.sampling) for row, ids in zip(rows, tokens, strict=True)]
        while engine.busy:
            for delta in engine.step():
                ended = delta.result is not None
                rest = sampling.max_new_tokens - len(delta.result.tokens) if ended else 0
                progress.advance(task, len(delta.tokens) + rest)
        stats = _stats(engine, requests)
    return [request.text.text.strip() for request in requests], stats


def _stats(engine: Any, requests: list[Any]) -> RoutingStats:
    import torch

    from drllm_fast.stats import RoutingStats

    plan = torch.tensor([request.path for request in requests], dtype=torch.int8)
    tokens = torch.tensor([request.held for request in requests])
    layers = engine.num_layers
    return RoutingStats(
        plan=plan,
        tokens=tokens,
        cached=tokens,
        layer_rows=plan.sum(0, dtype=torch.int64),
        layer_tokens=(plan * tokens[:, None]).sum(0),
        kv_bytes_per_token=torch.full((layers,), engine.pool.bytes_per_token()),
        kv_window=torch.zeros(layers, dtype=torch.int64),  # the pool keeps all of a row, whatever its layers look at
        forwards=engine.stats.prompt_forwards + engine.stats.steps,
    )


def _as_json(
    model: str, policy: str, budget: float | None, prompts: list[str], answers: list[str], stats: RoutingStats
) -> dict[str, Any]:
    columns = zip(
        prompts, answers, stats.plan.tolist(), stats.tokens.tolist(), stats.per_row_kv_bytes.tolist(), strict=True
    )
    rows = [
        {"prompt": text, "answer": answer, "path": path, "layers_run": sum(path), "tokens": count, "kv_bytes": size}
        for text, answer, path, count, size in columns
    ]
    names = ("visits_run", "visits_dense", "share", "kv_bytes", "kv_bytes_dense")
    totals = {name: getattr(stats, name) for name in names}
    return {"model": model, "policy": policy, "budget": budget, "results": rows, "totals": totals}
