"""`drllm-fast demo`: ten prompts on SmolLM2, each on its own path, beside the dense model, measured."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from drllm_fast.report import count, human_bytes, plot_plan, ranges, stdout_console, summary_table
from drllm_fast.routers import LayerRouters
from drllm_fast.smollm2 import NAME, cache_dir, load_smollm2

if TYPE_CHECKING:
    from drllm_fast.influence import StaticPolicy

CALIBRATION = 1  # of the cached order; raise it when calibrating means something else

PROMPTS = {
    "capital": "What is the capital of Portugal? Answer in one short sentence.",
    "week": "How many days are in a week?",
    "arithmetic": "Tom has 3 apples and buys 5 more. How many apples does he have now?",
    "code": "Write a Python function is_even(n) that returns True when n is even.",
    "translation": "Translate into French: 'Good evening, my friend.'",
    "science": "Which gas do plants take in from the air?",
    "list": "Name four fruits, one per line.",
    "shorten": (
        "Make this sentence shorter: The meeting that was planned for Monday morning has been moved to Tuesday "
        "afternoon because the room is not free."
    ),
    "summary": (
        "Summarise this paragraph in one sentence.\n\n"
        "For most of its history the lighthouse at the end of the bay was kept by one family. Every evening somebody "
        "climbed the hundred and forty steps, trimmed the wick, polished the lens and wrote the weather into a book "
        "that is now in the town's museum. In 1931 an electric lamp took the place of the oil, and in 1968 a clock "
        "took the place of the keeper. The light still turns each night, but the last member of the family to live "
        "there, who moved to the village as a girl, says that the sea was easier to read when somebody was watching "
        "it. Engineers visit twice a year, mostly to clean the glass, and the boats that once depended on the beam "
        "find their way by satellite. The town council has voted three times on whether to switch it off, and three "
        "times the fishermen, who no longer need it, have asked that it be kept burning."
    ),
    "question": (
        "Read the note and answer the question below it.\n\n"
        "Note: The workshop on Thursday moves from room 12 to room 40, since the projector in room 12 is broken. It "
        "starts at half past nine, not at nine, so that people who take the early train from the coast can be there. "
        "Lunch is at a quarter past twelve in the canteen; please tell Ines by Tuesday whether you eat meat. Bring a "
        "laptop with at least ten gigabytes of free space and, if you have one, last year's handout.\n\n"
        "Question: In which room is the workshop, and when does it start?"
    ),
}


def run_demo(
    *,
    budget: float,
    criterion: str,
    max_new_tokens: int,
    output: Path,
    rounds: int = 5,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    console: Console | None = None,
) -> dict[str, Any]:
    """Answer `PROMPTS` in one batch, each on the path that the bundled routers choose for it, print what each cost, and
    time it beside the dense model and a static path.

    Returns what was measured: tokens per second of each variant and round, and the ratios of the medians. Raises
    ValueError for a bad budget or criterion, OSError without SmolLM2 or where a file cannot be written, ImportError
    without matplotlib.
    """
    console = console or stdout_console()
    torch.manual_seed(seed)
    model, tokenizer = load_smollm2(dtype)
    model.to(device)
    layers = model.config.num_hidden_layers
    policy = static_policy(model, tokenizer, budget=budget, criterion=criterion)
    routers = LayerRouters.from_pretrained(NAME)
    routers.budget = budget
    chat = [[{"role": "user", "content": prompt}] for prompt in PROMPTS.values()]
    batch = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(device)
    lengths = batch["attention_mask"].sum(1).tolist()
    console.print(
        f"SmolLM2-135M-Instruct, {layers} blocks, {str(dtype).removeprefix('torch.')} on {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}. "
        f"One batch of {len(lengths)} prompts, {min(lengths)} to {max(lengths)} tokens each with the chat template."
    )

    model.enable_dynamic_routing(routers)
    try:
        static = list(policy.path)
        new = {"max_new_tokens": max_new_tokens, "do_sample": False}
        with model.routing.disabled(), _status("The dense model answers"):
            dense_answers = _answers(model, tokenizer, batch, new)
        with _status("The routers choose a path for each prompt, and the batch answers"):
            routed_answers = _answers(model, tokenizer, batch, new)
        stats = model.routing.stats
        plan = stats.plan.tolist()

        for row, name in enumerate(PROMPTS):
            path = plan[row]
            console.print(Text.assemble("\n", (name, "bold"), f"  {_words(path)}"))
            console.print(Text(_short(PROMPTS[name]), style="dim"))
            same = routed_answers[row] == dense_answers[row]
            answers = Table.grid(padding=(0, 2))
            if not same:
                answers.add_row("  dense", Text(dense_answers[row]))
            answers.add_row("  routed" if not same else "  both", Text(routed_answers[row]))
            console.print(answers)
        console.print()
        console.print(summary_table(stats, labels=list(PROMPTS)))
        console.print(
            f"Token visits: {stats.visits_run:,} of {stats.visits_dense:,} ({100 * stats.share:.1f} %). "
            f"KV cache: {human_bytes(stats.kv_bytes)} of {human_bytes(stats.kv_bytes_dense)}.\n"
        )
        plot_plan(stats, output, labels=list(PROMPTS), title="Layer paths of the demo's prompts")
        console.print(f"Heat map of the plan: {output}\n")

        timed = {"min_new_tokens": max_new_tokens, **new}
        runs = {
            "dense": lambda: _dense(model, batch, timed),
            "all blocks": lambda: _routed(model, batch, timed, [1] * layers),
            "static path": lambda: _routed(model, batch, timed, static),
            "routed paths": lambda: _routed(model, batch, timed, plan),
        }
        seconds = measure(runs, rounds, device)
        union = [max(column) for column in zip(*plan, strict=True)]
        called = {"static path": sum(map(bool, static)), "routed paths": sum(map(bool, union))}
        mean = {"static path": sum(static), "routed paths": sum(map(sum, plan)) / len(plan)}
        made = len(lengths) * max_new_tokens
        result = {name: [made / s for s in each] for name, each in seconds.items()}
        console.print(_speed_table(result, mean, called, layers, rounds, max_new_tokens))
        ratios = {name: statistics.median(r) / statistics.median(result["dense"]) for name, r in result.items()}
        for name in ("all blocks", "static path", "routed paths"):
            console.print(_verdict(name, result, "dense"))
        for name in ("static path", "routed paths"):
            console.print(_verdict(name, result, "all blocks"))
        if any(max(rates) > 2 * min(rates) for rates in result.values()):
            console.print("Rounds differ more than twofold: something else uses this machine. Try fewer --threads.")
        console.print(
            "'all blocks' runs every block of every row through the same machinery: against dense it shows packing "
            "instead of padding, and the machinery's own cost. What the other two gain on it comes from their paths.\n"
            "While decoding, a block costs nothing only if no row of the batch runs it: "
            f"{layers - called['static path']} of {layers} blocks on the static path, "
            f"{layers - called['routed paths']} on the routed ones. What different paths save is arithmetic and KV "
            "cache, not blocks that a step must call."
        )
    finally:
        model.disable_dynamic_routing()
    return {"tokens_per_second": result, "ratio": ratios, "share": stats.share, "plan": plan}


def static_policy(model: Any, tokenizer: Any, *, budget: float, criterion: str) -> StaticPolicy:
    """The training-free policy. Its order of blocks is kept in the user's cache, and serves this budget and all above.

    Calibrated where the file is missing, damaged, of another model or too short for the budget.
    """
    from drllm_fast.influence import StaticPolicy

    dtype = str(model.dtype).removeprefix("torch.")
    path = cache_dir() / f"{model.name_or_path}-{criterion}-{dtype}-v{CALIBRATION}.json"
    with contextlib.suppress(OSError, ValueError):
        policy = StaticPolicy.load(path)
        policy.budget = budget
        policy.bind(model)
        return policy
    policy = StaticPolicy.calibrate(model, tokenizer, budget=budget, criterion=criterion, progress=sys.stderr.isatty())
    path.parent.mkdir(parents=True, exist_ok=True)
    complete = path.with_suffix(f".{os.getpid()}.tmp")
    policy.save(complete)
    complete.replace(path)
    return policy


def measure(runs: dict[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each run in each round. Rounds are interleaved, each starts with another run; one round warms up."""
    from rich.progress import Progress

    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("Timing", total=len(names) * (rounds + 1))
        for number in range(rounds + 1):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                _wait(device)
                start = time.perf_counter()
                runs[name]()
                _wait(device)
                if number:
                    seconds[name].append(time.perf_counter() - start)
                progress.advance(task)
    return seconds


def _dense(model: Any, batch: Any, options: dict[str, Any]) -> None:
    with model.routing.disabled():
        model.generate(**batch, **options)


def _routed(model: Any, batch: Any, options: dict[str, Any], plan: Sequence[Any]) -> None:
    with model.routing.using(plan):
        model.generate(**batch, **options)


def _answers(model: Any, tokenizer: Any, batch: Any, options: dict[str, Any]) -> list[str]:
    out = model.generate(**batch, **options)
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _speed_table(
    result: dict[str, list[float]],
    mean: dict[str, float],
    called: dict[str, int],
    layers: int,
    rounds: int,
    new_tokens: int,
) -> Table:
    title = f"Prefill and {count(new_tokens, 'new token')} a row, greedy, {count(rounds, 'interleaved round')}"
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("", no_wrap=True)
    for header in ("blocks/row", "blocks/step", "tok/s median", "min-max", "vs dense"):
        table.add_column(header, justify="right", no_wrap=True)
    dense = statistics.median(result["dense"])
    for name, rates in result.items():
        median = statistics.median(rates)
        table.add_row(
            name,
            f"{mean.get(name, layers):.1f} of {layers}",
            str(called.get(name, layers)),
            f"{median:.1f}",
            f"{min(rates):.1f}-{max(rates):.1f}",
            f"{median / dense:.2f}x",
        )
    return table


def _verdict(name: str, result: dict[str, list[float]], other: str) -> str:
    """What the rounds say of two variants, and nothing where they are fewer than 3 or their ranges overlap."""
    mine, theirs = result[name], result[other]
    ratio = statistics.median(mine) / statistics.median(theirs)
    if len(mine) < 3:
        do = "does" if len(mine) == 1 else "do"
        return f"{name} against {other}: {ratio:.2f}x; {count(len(mine), 'round')} {do} not tell them apart."
    if min(mine) <= max(theirs) and max(mine) >= min(theirs):
        return f"{name} against {other}: {ratio:.2f}x; their rounds overlap, so this run does not tell them apart."
    return f"{name} against {other}: {ratio:.2f}x, {'faster' if ratio > 1 else 'slower'} in every round."


def _words(path: Sequence[int]) -> str:
    """A path in words: 'skips 19-21, repeats 27'."""
    parts = [
        f"{verb} {ranges((i for i, times in enumerate(path) if times == value), width=60)}"
        for value, verb in ((0, "skips"), (2, "repeats"))
        if value in path
    ]
    return ", ".join(parts) or "every block once"


def _short(text: str, width: int = 110) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _status(text: str) -> Any:
    return Console(stderr=True).status(text)
