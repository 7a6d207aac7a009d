"""`drllm-fast generate --input prompts.jsonl --output answers.jsonl`: a bar while it runs, a table at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from drllm_fast.generation.prompt_files import AnswerFile, hash_policy, hash_tokens, read_rows
from drllm_fast.generation.prompt_rows import answer_rows, encode_rows
from drllm_fast.generation.sampling import Sampling
from drllm_fast.search.interrupts import Interrupts


def answer_file(
    load: Callable[[], tuple[Any, Any, bool]],
    prompts: Path,
    output: Path,
    sampling: Sampling,
    *,
    keep: list[str],
    ordered: bool,
    overwrite: bool,
    batch_size: int,
    made_of: dict[str, Any],
    notes: dict[str, Any],
) -> None:
    """Answer the prompts that have no answer in `output` yet.

    load      makes the routed model, its tokenizer, and whether texts are chats; called if something is left to do, or
              if the notes are not those of the answers that are there
    sampling  of what the rows do not say
    made_of   what else decides the answers; notes: by what names

    KeyboardInterrupt says how to go on; of the answers that ended, those that the last step ended may be missing.
    """
    rows, said = read_rows(prompts, sampling, keep)
    if output.exists() and output.samefile(prompts):
        raise ValueError(f"--output {output} is the file of the prompts; give another name")
    made_of = {"prompts": said, **made_of, **asdict(sampling), "keep": sorted(keep), "ordered": ordered}
    answers = AnswerFile(output, overwrite=overwrite)
    console = Console(stderr=True)
    with Interrupts() as interrupts, answers:
        answers.compare(made_of)  # before minutes of loading
        found = len(answers.done)
        left = [row for row in rows if row.line not in answers.done]
        seconds = made = 0
        if left or not answers.notes.items() >= notes.items():
            model, tokenizer, chat = load()
            tokens = encode_rows(model, tokenizer, rows, chat=chat)
            made_of |= _identity(model) | {"prompt_tokens": hash_tokens(tokens)}
            answers.compare(made_of)
        if left:
            answers.begin(made_of, notes)
            if found:
                console.print(f"{found} of {len(rows)} prompts are answered in {output} already", highlight=False)
            tokens = [ids for row, ids in zip(rows, tokens, strict=True) if row.line not in answers.done]
            before, start = answers.tokens, time.monotonic()
            stream = "ordered" if ordered else "finished"
            try:
                with _bar(console, len(rows), found) as bar:
                    for answer in answer_rows(model, tokenizer, left, tokens, stream=stream, max_batch=batch_size):
                        with interrupts.shielded():
                            answers.add(left[answer.index], answer)
                        made, seconds = answers.tokens - before, time.monotonic() - start
                        bar.update(bar.task_ids[0], advance=1, rate=f"{made / seconds:.1f} tokens/s")
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted; {len(answers.done)} of {len(rows)} prompts are answered in {output}, run the same "
                    "command (without --overwrite) to go on"
                ) from None
        console.print(_table(answers, found, made, seconds))
        console.print(Text(f"The answers are in {output}"), soft_wrap=True)


def _identity(model: Any) -> dict[str, Any]:
    """What the loaded model adds to what answers are made of."""
    from drllm_fast.fingerprint import fingerprint
    from drllm_fast.search.manifest import fingerprint_hash

    policy = model.routing.policy if hasattr(model, "routing") else None
    return {
        "model": fingerprint_hash(fingerprint(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "policy_hash": None if policy is None else hash_policy(policy),
    }


def _bar(console: Console, total: int, found: int) -> Progress:
    columns = TextColumn("Generating"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not sys.stderr.isatty())
    bar.add_task("", total=total, completed=found, rate="")
    return bar


def _table(answers: AnswerFile, found: int, made: int, seconds: float) -> Table:
    """What is in the file; its speed is that of what was added now."""
    count = answers.paths.total()
    blocks = len(next(iter(answers.paths)))
    mean = sum(sum(path) * times for path, times in answers.paths.items()) / count
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("prompts", "answered now", "tokens", "tokens/s", "blocks run", "of dense", "paths"):
        table.add_column(name, justify="right")
    table.add_row(
        f"{count:,}",
        f"{count - found:,}",
        f"{answers.tokens:,}",
        f"{made / seconds:,.1f}" if seconds else "-",
        f"{mean:.2f} of {blocks}",
        f"{100 * mean / blocks:.1f} %",
        f"{len(answers.paths):,}",
    )
    return table
