"""Whether decode steps gain by torch.compile: norms and perceptrons of all layers compiled, everything else as it is.

    python -m benchmarks.bench_compile

SmolLM2-135M-Instruct in float32, on the CPU with packed weights, rows that have 128 tokens. Attention is an op of its
own and does not change. Steps as they are and compiled run in turns; the table gives the median of paired ratios with
its quartiles, and the largest difference of a logit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.rounds import about_this_machine, quartiles
from drllm_fast.generation import Engine
from drllm_fast.generation.decode_batch import DecodeBatch
from drllm_fast.generation.kv_pool import KVPool
from drllm_fast.smollm2 import load_smollm2

TOKENS, STEPS = 128, 6
PARTS = ("mlp", "input_layernorm", "post_attention_layernorm")


@contextmanager
def replaced(forwards: list[tuple[torch.nn.Module, Callable]]) -> Iterator[None]:
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in forwards:
            del module.forward


def step(engine: Engine, rows: int) -> tuple[float, torch.Tensor]:
    """The median time of a step of so many rows, and the last logits."""
    layers, capacity = engine.num_layers, TOKENS + STEPS
    torch.manual_seed(0)
    pool = KVPool(rows * layers * capacity)
    starts = [row * layers * capacity for row in range(rows)]
    plan = np.ones((rows, layers), dtype=np.int8)
    batch = DecodeBatch(engine._owner, pool, plan, starts, [capacity] * rows, [TOKENS] * rows, engine.device)
    config = engine.decoder.config
    shape = 1, config.num_key_value_heads, pool.size, config.hidden_size // config.num_attention_heads
    pool.write(torch.arange(pool.size), torch.randn(shape), torch.randn(shape))
    tokens, seconds = torch.ones(rows, dtype=torch.int64), []
    for _ in range(STEPS):
        began = time.perf_counter()
        logits = batch.step(engine.top, engine._cache, tokens)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]), logits


def main(rounds: Annotated[int, typer.Option(min=2)] = 9) -> None:
    """Benchmark of torch.compile below the engine."""
    torch._dynamo.config.cache_size_limit = 64
    model, tokenizer = load_smollm2(torch.float32)
    modules = [getattr(layer, part) for layer in model.model.layers for part in PARTS]
    compiled = [(module, torch.compile(module.forward)) for module in modules]
    print(*(f"{name}: {value}" for name, value in about_this_machine("cpu").items()), sep="\n")
    print("\n| rows | time compiled, of as it is | largest difference of a logit |\n|---:|---:|---:|")
    with Engine(model, tokenizer, max_batch=64, lookahead=0, pack_weights=True) as engine, torch.inference_mode():
        engine.pack()
        for rows in (1, 8, 64):
            with replaced(compiled):
                step(engine, rows)
            ratios = []
            for _ in range(rounds):
                plain, expected = step(engine, rows)
                with replaced(compiled):
                    seconds, logits = step(engine, rows)
                ratios.append(seconds / plain)
            print(f"| {rows} | {quartiles(ratios)} | {(logits - expected).abs().max():.1e} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
