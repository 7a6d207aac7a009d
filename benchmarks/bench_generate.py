"""What routing, packing and grouping bring when many prompts are answered: SmolLM2-135M-Instruct, greedy.

    python -m benchmarks.bench_generate --data FOLDER --output benchmarks/results/generate

Prompts: questions and passages of FOLDER, or pieces of the bundled text without it, of 10 to 300 tokens, in an order
that is drawn once. Every row of the engine makes the same work: of each prompt as many tokens as the dense model's own
answer has (at most --max-new-tokens), so that no row is faster for answers that end sooner. Hugging Face's answers end
where they end; `tokens` in the rounds says how many they had.

    throughput   prompts answered in one call: Hugging Face's `generate` padded on the left at its best batch size (by
                 arrival, and sorted by length), the engine dense, with the shipped routers and with static masks
    order        the engine with small batches, rows joining by path or by arrival
    latency      one prompt at a time: time to the first token, and from one token to the next
    memory       keys and values held; resident memory while the routed engine answers --many prompts

In each round all rows run in turn, forwards and backwards in alternation; the figures are medians over rounds of ratios
taken within a round. `ideal` is what visits that cost nothing would leave: with s the share of the dense engine's time
that is spent in blocks and v the visits run as a share of the dense model's, 1 / (1 - s (1 - v)) of its speed.
Rounds that are done are kept in OUTPUT/rounds.jsonl, and a run that was broken off goes on from there.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import drllm_fast
from benchmarks.rounds import Rounds, about_this_machine, ideal, quartiles, spread
from drllm_fast import Sampling, StaticPolicy
from drllm_fast.generation import Engine
from drllm_fast.generation.decode_batch import DecodeBatch
from drllm_fast.generation.prompt_forward import PromptForward
from drllm_fast.influence import calibration_texts
from drllm_fast.routers import LayerRouters
from drllm_fast.smollm2 import NAME, load_smollm2

BUDGETS = (1.0, 0.9, 0.8)
HF_BATCHES = (16, 32, 64)
FILES = ("arc_easy.train", "gsm8k.train", "squad_v2.dev", "hellaswag.dev", "commonsense_qa.train")


def load_prompts(tokenizer: Any, data: Path | None, count: int, seed: int = 0) -> list[list[int]]:
    """Token ids of `count` prompts, as many of each range of lengths as there are."""
    rng = random.Random(seed)
    if data is None:
        words = " ".join(calibration_texts()).split()
        sizes = [rng.randint(8, 220) for _ in range(4 * count)]
        texts = [" ".join(words[at : at + size]) for size in sizes for at in (rng.randrange(len(words) - size),)]
    else:
        from drllm_fast.search.tasks import load_task

        texts = []
        for name in FILES:
            file = next(data.glob(f"{name}.jsonl*"), None)
            if file is not None:
                texts += [item.prompt for item in load_task(str(file), limit=600)]
    rng.shuffle(texts)
    ranges: dict[int, list[list[int]]] = {}
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        if 10 <= len(ids) <= 300:
            ranges.setdefault(len(ids) // 60, []).append(ids)
    found: list[list[int]] = []
    while len(found) < count and any(ranges.values()):
        found += [some.pop() for some in ranges.values() if some]
    rng.shuffle(found)
    return found[:count]


class Bench:
    def __init__(self, dtype: torch.dtype, data: Path | None, prompts: int, max_new_tokens: int):
        self.model, self.tokenizer = load_smollm2(dtype)
        self.prompts = load_prompts(self.tokenizer, data, prompts)
        self.layers = self.model.config.num_hidden_layers
        self.new = max_new_tokens
        dense = self.engine()[1]
        self.lengths = [max(1, len(r.tokens)) for r in dense]
        self.samplings = [Sampling(max_new_tokens=n, ignore_eos=True) for n in self.lengths]

    # -- the contenders: each returns seconds, and what it says of itself
    def engine(self, policy: object = None, budget: float | None = None, **options: Any) -> tuple[float, list]:
        samplings = getattr(self, "samplings", Sampling(max_new_tokens=self.new))
        if policy is not None:
            self.model.enable_dynamic_routing(policy, budget=budget)
        try:
            began = time.perf_counter()
            results = drllm_fast.generate(self.model, self.tokenizer, self.prompts, sampling=samplings, **options)
            return time.perf_counter() - began, results
        finally:
            if policy is not None:
                self.model.disable_dynamic_routing()

    def hugging_face(self, batch: int, ordered: bool = False, prompts: list | None = None) -> tuple[float, list]:
        prompts = self.prompts if prompts is None else prompts
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i])) if ordered else list(range(len(prompts)))
        answers: list[list[int]] = [[] for _ in prompts]
        began = time.perf_counter()
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            width = max(len(prompts[i]) for i in rows)
            ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(rows):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=self.new, do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
            for row, i in enumerate(rows):
                new = out[row, width:].tolist()
                ends = [at for at, token in enumerate(new) if token == self.tokenizer.eos_token_id]
                answers[i] = new[: ends[0]] if ends else new
        return time.perf_counter() - began, answers

    # -- what the ideal is made of
    def share(self, results: list) -> float:
        """Visits run as a share of the dense model's, over all tokens that went through blocks."""
        tokens = [r.prompt_tokens + len(r.tokens) - 1 for r in results]
        return sum(r.visits * n for r, n in zip(results, tokens, strict=True)) / (self.layers * sum(tokens))

    def block_share(self, **options: Any) -> float:
        """The share of the dense engine's time that is spent in blocks."""
        with in_blocks() as spent:
            seconds, _ = self.engine(**options)
        return sum(spent) / seconds


@contextmanager
def in_blocks() -> Iterator[list[float]]:
    """Seconds of each application of a block."""
    spent: list[float] = []
    kinds = (PromptForward, DecodeBatch)
    before = [kind.run_layer for kind in kinds]

    def timed(run: Callable) -> Callable:
        def run_layer(self, *args, **kwargs):
            began = time.perf_counter()
            out = run(self, *args, **kwargs)
            spent.append(time.perf_counter() - began)
            return out

        return run_layer

    for kind, run in zip(kinds, before, strict=True):
        kind.run_layer = timed(run)
    try:
        yield spent
    finally:
        for kind, run in zip(kinds, before, strict=True):
            kind.run_layer = run


def policies(bench: Bench) -> dict[str, tuple[Any, float | None]]:
    routers = LayerRouters.from_pretrained(NAME)
    found: dict[str, tuple[Any, float | None]] = {"dense": (None, None)}
    for budget in BUDGETS:
        found[f"routers {budget}"] = (routers, budget)
    for budget in BUDGETS[1:]:
        found[f"mask {budget}"] = (StaticPolicy.calibrate(bench.model, bench.tokenizer, budget=budget), None)
    return found


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def best_batch(bench: Bench, rounds: Rounds) -> int:
    """Of Hugging Face's `generate`, with the first 64 prompts."""
    sample = bench.prompts[:64]

    def choose() -> dict:
        tried = {b: bench.hugging_face(b, prompts=sample)[0] for b in HF_BATCHES if b <= len(sample)}
        return {"best": min(tried, key=tried.get), "tried": tried}

    rounds.run("choose", 1, {"batch": choose})
    return int(rounds.of("choose", "batch", "best")[0])


def throughput(
    bench: Bench, rounds: Rounds, count: int, chosen: dict, best: int, hf_rounds: int, hf_sorted: bool
) -> list[str]:
    def engine_row(policy: Any, budget: float | None) -> Callable[[], dict]:
        def run() -> dict:
            seconds, results = bench.engine(policy, budget)
            assert [len(r.tokens) for r in results] == bench.lengths
            return {"seconds": seconds, "share": bench.share(results), "paths": len({r.path for r in results})}

        return run

    def hugging_face_row(ordered: bool) -> Callable[[], dict]:
        def run() -> dict:
            seconds, answers = bench.hugging_face(best, ordered)
            return {"seconds": seconds, "tokens": sum(map(len, answers))}

        return run

    rows: dict[str, Callable[[], dict]] = {
        f"Hugging Face, batch {best}": hugging_face_row(False),
        **({f"Hugging Face, batch {best}, sorted": hugging_face_row(True)} if hf_sorted else {}),
        **{name: engine_row(*policy) for name, policy in chosen.items()},
    }
    rounds.run("throughput", count, rows, fewer={name: hf_rounds for name in rows if name.startswith("Hugging")})
    rounds.run("blocks", 1, {"share": lambda: {"value": bench.block_share()}})
    s = rounds.of("blocks", "share", "value")[0]
    hf = f"Hugging Face, batch {best}"
    lines = [
        f"Blocks take {s:.3f} of the dense engine's time. {sum(map(len, bench.prompts))} prompt tokens, "
        f"{sum(bench.lengths)} new tokens.",
        "",
        "| row | paths | visits | x Hugging Face | x dense engine | ideal | of ideal |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        over_hf = rounds.ratios("throughput", hf, row)
        over_dense = rounds.ratios("throughput", "dense", row)
        if row.startswith("Hugging"):
            lines.append(f"| {row} | - | 1.000 | {spread(over_hf)} | {spread(over_dense)} | - | - |")
            continue
        share, paths = rounds.of("throughput", row, "share")[0], rounds.of("throughput", row, "paths")[0]
        best_case = ideal(s, share)
        of_ideal = [r / best_case for r in over_dense]
        lines.append(
            f"| {row} | {paths} | {share:.3f} | {spread(over_hf)} | {spread(over_dense)} | {best_case:.3f} | "
            f"{spread(of_ideal)} |"
        )
    picture(rounds, list(rows), rounds.file.with_name("throughput.png"))
    return lines


def picture(rounds: Rounds, names: list[str], file: Path) -> None:
    """Speed of each row over Hugging Face's by arrival: a point a round, and where the ideal is."""
    from matplotlib.figure import Figure

    hf, s = names[0], rounds.of("blocks", "share", "value")[0]
    figure = Figure(figsize=(7, 0.45 * len(names) + 1), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        ratios = rounds.ratios("throughput", hf, name)
        axes.barh(place, statistics.median(ratios), color="#bbbbbb" if name.startswith("Hugging") else "#4878a8")
        axes.plot(ratios, [place] * len(ratios), "k.", markersize=4)
        if not name.startswith("Hugging"):
            dense = statistics.median(rounds.ratios("throughput", hf, "dense"))
            best = dense * ideal(s, rounds.of("throughput", name, "share")[0])
            axes.plot([best, best], [place - 0.4, place + 0.4], color="#c04020", linewidth=2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("times Hugging Face, padded by arrival; dots: rounds, red: ideal")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def order(bench: Bench, rounds: Rounds, count: int, chosen: dict) -> list[str]:
    routers = chosen["routers 0.8"]

    def run(batch: int, how: str) -> dict:
        bench.model.enable_dynamic_routing(routers[0], budget=routers[1])
        spent = 0.0
        try:
            options = {"max_batch": batch, "lookahead": 96, "order": how, "row_tokens": 364}
            with Engine(bench.model, bench.tokenizer, **options) as engine:
                for prompt, sampling in zip(bench.prompts, bench.samplings, strict=True):
                    engine.submit(prompt, sampling)
                while engine.busy:
                    began, steps = time.perf_counter(), engine.stats.steps
                    engine.step()
                    if engine.stats.steps > steps:  # prompts are read alike in either order
                        spent += time.perf_counter() - began
                stats = engine.stats
        finally:
            bench.model.disable_dynamic_routing()
        return {
            "seconds": spent,
            "blocks": stats.block_runs / stats.steps,
            "visits": stats.visits / sum(n - 1 for n in bench.lengths),
        }

    sizes = (8, 32)
    rows = {
        f"batch {batch}, {how}": (lambda batch=batch, how=how: run(batch, how))
        for batch in sizes
        for how in ("arrival", "paths")
    }
    rounds.run("order", count, rows)
    lines = [
        "Decode steps alone. A row's own path has the visits of the last column.",
        "",
        "| batch | speed by path, over by arrival | blocks of a step, by arrival | by path | of a row |",
        "|---:|---:|---:|---:|---:|",
    ]
    for batch in sizes:
        names = f"batch {batch}, arrival", f"batch {batch}, paths"
        arrival, paths = (rounds.of("order", name, "blocks")[0] for name in names)
        own = rounds.of("order", names[0], "visits")[0]
        lines.append(
            f"| {batch} | {spread(rounds.ratios('order', *names))} | {arrival:.2f} | {paths:.2f} | {own:.2f} |"
        )
    return lines


def latency(bench: Bench, rounds: Rounds, count: int, chosen: dict) -> list[str]:
    """All rows answer a prompt in turn before the next prompt, so that they share what else the machine does."""
    prompts, new = bench.prompts[:16], 17
    routers = chosen["routers 0.8"][0]
    given = {name: {"budget": budget} for name, (policy, budget) in chosen.items() if policy is routers}
    given["dense"] = {"path": [1] * bench.layers}
    for name, (policy, _) in chosen.items():
        if isinstance(policy, StaticPolicy):
            given[name] = {"path": policy.path}

    def answer(engine: Engine, prompt: list[int], spent: list[float], row: dict) -> dict:
        request = engine.submit(prompt, Sampling(max_new_tokens=new, ignore_eos=True), **row)
        steps, blocks = [], []
        while engine.busy:
            spent.clear()
            began = time.perf_counter()
            engine.step()
            steps.append(time.perf_counter() - began)
            blocks.append(sum(spent) / steps[-1])
        return {
            "first": steps[0], "token": statistics.median(steps[1:]), "visits": request.visits,
            "blocks_first": blocks[0], "blocks_token": statistics.median(blocks[1:]),
        }  # fmt: skip

    def run() -> dict:
        found: dict[str, list[dict]] = {name: [] for name in given}
        bench.model.enable_dynamic_routing(routers)
        try:
            with in_blocks() as spent, Engine(bench.model, bench.tokenizer, max_batch=1, lookahead=0) as engine:
                answer(engine, prompts[0], spent, given["dense"])
                for number, prompt in enumerate(prompts):
                    for name in list(given)[:: 1 if number % 2 == 0 else -1]:
                        found[name].append(answer(engine, prompt, spent, given[name]))
        finally:
            bench.model.disable_dynamic_routing()
        return {"answers": found}

    rounds.run("latency", count, {"all": run})
    answers: dict[str, list[dict]] = {name: [] for name in given}
    for entry in rounds.of("latency", "all", "answers"):
        for name in given:
            answers[name] += entry[name]
    s = {part: statistics.median(a[f"blocks_{part}"] for a in answers["dense"]) for part in ("token", "first")}
    lines = [
        f"{len(prompts)} prompts, {new} new tokens each; medians of ratios, with quartiles. "
        f"Blocks take {s['token']:.3f} of a dense token's time and {s['first']:.3f} of the time to the first. "
        "Ideals are those of each prompt's path.",
        "",
        "| row | visits | a token, of dense | over ideal | first token, of dense | over ideal |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in chosen:
        cells = []
        for part in ("token", "first"):
            pairs = [(a, a[part] / d[part]) for a, d in zip(answers[name], answers["dense"], strict=True)]
            over = [ratio * ideal(s[part], a["visits"] / bench.layers) for a, ratio in pairs]
            cells.append(f"{quartiles([ratio for _, ratio in pairs])} | {quartiles(over)}")
        visits = statistics.mean(a["visits"] for a in answers[name]) / bench.layers
        lines.append(f"| {name} | {visits:.3f} | {cells[0]} | {cells[1]} |")
    return lines


def memory(bench: Bench, rounds: Rounds, chosen: dict, many: int) -> list[str]:
    def run(policy: Any, budget: float | None, many: int) -> dict:
        if policy is not None:
            bench.model.enable_dynamic_routing(policy, budget=budget)
        resident, done, used, visited, dense = [], 0, 0, 0, 0
        began = time.perf_counter()
        try:
            with Engine(bench.model, bench.tokenizer, row_tokens=364) as engine:
                four = Sampling(max_new_tokens=4, ignore_eos=True)
                for i in range(many):
                    engine.submit(bench.prompts[i % len(bench.prompts)], four)
                while engine.busy:
                    deltas = engine.step()
                    rows = [*engine.schedule.ready, *engine.schedule.running]
                    used += engine.pool.used  # what the pool has given away, against what rows should have
                    visited += sum(r.visits * r.capacity for r in rows)
                    dense += bench.layers * sum(r.capacity for r in rows)
                    for delta in deltas:
                        if delta.result is not None:
                            done += 1
                            if done % (many // 8 or 1) == 0:
                                resident.append(resident_bytes())
                peak, most, left = engine.stats.peak_kv_bytes, engine.stats.peak_rows, engine.pool.used
        finally:
            if policy is not None:
                bench.model.disable_dynamic_routing()
        return {
            "seconds": time.perf_counter() - began, "prompts": many, "share": visited / dense, "held": used / dense,
            "peak": peak, "rows": most, "left": left, "early": resident[1], "late": resident[-1],
        }  # fmt: skip

    few = len(bench.prompts)
    numbers = {"routers 0.8": many, "dense": few, "mask 0.8": few}
    rounds.run("memory", 1, {name: (lambda name=name, n=n: run(*chosen[name], n)) for name, n in numbers.items()})
    lines = [
        "4 new tokens for each prompt. Held is what the pool had given away, a mean over steps. Resident memory is the "
        "process's, after a quarter of the prompts and at the end.",
        "",
        "| row | prompts | visits of dense | held of dense | peak MB | rows | left | resident GB, 1/4 | at the end |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in numbers:
        e = rounds.found["memory", 0, name]
        lines.append(
            f"| {name} | {e['prompts']} | {e['share']:.4f} | {e['held']:.4f} | {e['peak'] / 1e6:.1f} | {e['rows']} | "
            f"{e['left']} | {e['early'] / 1e9:.3f} | {e['late'] / 1e9:.3f} |"
        )
    return lines


def main(
    output: Annotated[Path, typer.Option(help="Folder for the rounds and the report.")],
    data: Annotated[Path | None, typer.Option(help="Folder with question files (JSON lines).")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    prompts: Annotated[int, typer.Option(min=64)] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    hf_rounds: Annotated[int | None, typer.Option(min=1, help="Of Hugging Face's rows; default: all.")] = None,
    hf_sorted: Annotated[bool, typer.Option(help="Hugging Face also with prompts sorted by length.")] = True,
    hf_batch: Annotated[int | None, typer.Option(min=1, help="Hugging Face's batch size; default: the best.")] = None,
    many: Annotated[int, typer.Option(min=8, help="Prompts of the memory part.")] = 2000,
    parts: Annotated[str, typer.Option(help="Which parts, comma-separated.")] = "throughput,order,latency,memory",
) -> None:
    """Benchmark of `drllm_fast.generate`."""
    bench = Bench(getattr(torch, dtype), data, prompts, max_new_tokens)
    about = {
        "model": NAME, "dtype": dtype, "prompts": len(bench.prompts), "max_new_tokens": max_new_tokens,
        **about_this_machine("cpu"), "data": "given" if data else "bundled",
    }  # fmt: skip
    done = Rounds(output / "rounds.jsonl", about)
    chosen = policies(bench)
    report = [f"{name}: {value}" for name, value in about.items()]
    makers = {
        "throughput": lambda: throughput(
            bench, done, rounds, chosen, hf_batch or best_batch(bench, done), hf_rounds or rounds, hf_sorted
        ),
        "order": lambda: order(bench, done, rounds, chosen),
        "latency": lambda: latency(bench, done, rounds, chosen),
        "memory": lambda: memory(bench, done, chosen, many),
    }
    for part in parts.split(","):
        report += ["", f"## {part}", "", *makers[part]()]
    text = "\n".join(report) + "\n"
    (output / "report.md").write_text(text)
    typer.echo(text)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
