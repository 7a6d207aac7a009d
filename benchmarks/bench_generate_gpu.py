"""Generation on a GPU: a model of the shape of Llama-3.2-3B with random weights, in bf16, greedy.

    python -m benchmarks.bench_generate_gpu --output benchmarks/results/generate_gpu

Rows: Hugging Face's `generate` padded on the left, as it is and with a static cache and torch.compile, each at its
best batch size; the engine with and without CUDA graphs, dense, with one path of 0.9 and of 0.8, and with sixteen paths
of 0.8. Every row makes --max-new-tokens of each prompt. All rows run in turn in each round, forwards and backwards in
alternation, after a run of each that is not timed (it compiles and captures); figures are medians of ratios within a
round. Blocks' share of the time is what the dense engine saves when no block runs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import drllm_fast
from benchmarks.rounds import Rounds, about_this_machine, ideal, spread
from drllm_fast import Sampling

# hidden, intermediate, layers, heads, key heads, vocabulary
SHAPES = {"llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256), "tiny": (64, 128, 6, 4, 2, 512)}
HF_BATCHES = (32, 64, 128, 256)


class Bench:
    def __init__(self, shape: str, device: str, prompts: int, max_new_tokens: int, seed: int = 0):
        hidden, intermediate, layers, heads, key_heads, vocabulary = SHAPES[shape]
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=key_heads, vocab_size=vocabulary, head_dim=hidden // heads, tie_word_embeddings=True,
            max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(seed)
        with torch.device(device):
            self.model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
        rng = random.Random(seed)
        self.prompts = [[rng.randrange(1, vocabulary) for _ in range(rng.randint(10, 300))] for _ in range(prompts)]
        self.layers, self.new, self.device = layers, max_new_tokens, torch.device(device)
        self.sampling = Sampling(max_new_tokens=max_new_tokens, ignore_eos=True)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def engine(self, paths: list[list[int]] | None, graphs: bool | None) -> dict[str, Any]:
        self.synchronize()
        began = time.perf_counter()
        results = drllm_fast.generate(
            self.model, self.tokenizer, self.prompts, sampling=self.sampling, paths=paths, graphs=graphs,
            max_batch=256, row_tokens=300 + self.new,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        tokens = [r.prompt_tokens + len(r.tokens) - 1 for r in results]
        visits = sum(r.visits * n for r, n in zip(results, tokens, strict=True))
        return {"seconds": seconds, "share": visits / (self.layers * sum(tokens))}

    def hugging_face(self, batch: int, static: bool) -> dict[str, Any]:
        """Padded to the longest of a batch; with a static cache to the longest of all, so that shapes stay."""
        most = max(map(len, self.prompts))
        self.synchronize()
        began = time.perf_counter()
        for start in range(0, len(self.prompts), batch):
            rows = self.prompts[start : start + batch]
            width = most if static else max(map(len, rows))
            ids = torch.zeros(len(rows), width, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(rows):
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            out = self.model.generate(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device), do_sample=False, pad_token_id=0,
                min_new_tokens=self.new, max_new_tokens=self.new,
                **({"cache_implementation": "static"} if static else {}),  # generate then compiles the decode step
            )  # fmt: skip
            assert out.shape[1] == width + self.new
        self.synchronize()
        return {"seconds": time.perf_counter() - began}

    def best_batch(self, static: bool) -> int:
        tried = {}
        for batch in HF_BATCHES:
            if batch > len(self.prompts):
                break
            self.hugging_face(batch, static)  # compiles
            tried[batch] = self.hugging_face(batch, static)["seconds"]
        return min(tried, key=tried.get)


def paths(layers: int, budget: float, kinds: int, count: int) -> list[list[int]]:
    """A path for each prompt, out of so many; the first and the last two blocks always run."""
    rng = random.Random(layers)
    skipped = round((1 - budget) * layers)
    some = []
    for _ in range(kinds):
        out = set(rng.sample(range(2, layers - 2), skipped))
        some.append([0 if layer in out else 1 for layer in range(layers)])
    return [some[i % kinds] for i in range(count)]


def main(
    output: Annotated[Path, typer.Option(help="Folder for the rounds and the report.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3.2-3b",
    device: Annotated[str, typer.Option(help="cuda, or cpu to try it.")] = "cuda",
    prompts: Annotated[int, typer.Option(min=32)] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Benchmark of `drllm_fast.generate` on a GPU."""
    bench = Bench(shape, device, prompts, max_new_tokens)
    about = {"shape": shape, "prompts": prompts, "max_new_tokens": max_new_tokens, **about_this_machine(device)}
    done = Rounds(output / "rounds.jsonl", about)
    for static in (False, True):
        name = "static cache, compiled" if static else "eager"
        done.run("choose", 1, {name: lambda static=static: {"best": bench.best_batch(static)}})
    eager, static = (int(done.of("choose", name, "best")[0]) for name in ("eager", "static cache, compiled"))

    given = {"dense": None}
    given |= {f"one path of {budget}": paths(bench.layers, budget, 1, prompts) for budget in (0.9, 0.8)}
    given["sixteen paths of 0.8"] = paths(bench.layers, 0.8, 16, prompts)
    hugging = f"Hugging Face, batch {eager}"
    rows: dict[str, Callable[[], dict]] = {
        hugging: lambda: bench.hugging_face(eager, False),
        f"Hugging Face, static cache, compiled, batch {static}": lambda: bench.hugging_face(static, True),
    }
    kinds = (("", False), (", graphs", None)) if bench.device.type == "cuda" else (("", False),)
    for suffix, graphs in kinds:
        for name, some in given.items():
            rows[name + suffix] = lambda some=some, graphs=graphs: bench.engine(some, graphs)
        nothing = [[0] * bench.layers] * prompts
        rows[f"no block{suffix}"] = lambda some=nothing, graphs=graphs: bench.engine(some, graphs)
    for row in rows.values():
        row()
    done.run("throughput", rounds, rows)

    lines = [f"{name}: {value}" for name, value in about.items()]
    lines += [
        "",
        "| row | visits | x Hugging Face | x dense engine | ideal | of ideal |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row.startswith("no block"):
            continue
        over = spread(done.ratios("throughput", hugging, row))
        if row.startswith("Hugging"):
            lines.append(f"| {row} | 1.000 | {over} | - | - | - |")
            continue
        suffix = ", graphs" if row.endswith("graphs") else ""
        share = done.of("throughput", row, "share")[0]
        blocks = 1 - statistics.median(1 / r for r in done.ratios("throughput", f"dense{suffix}", f"no block{suffix}"))
        ratios = done.ratios("throughput", f"dense{suffix}", row)
        best = ideal(blocks, share)
        of_ideal = spread([r / best for r in ratios])
        lines.append(f"| {row} | {share:.3f} | {over} | {spread(ratios)} | {best:.3f} | {of_ideal} |")
    text = "\n".join(lines) + "\n"
    (output / "report.md").write_text(text)
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
