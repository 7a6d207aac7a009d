"""The executor against Hugging Face's own forward: SmolLM2-135M-Instruct in bf16, side by side in one run.

    pytest benchmarks/bench_executor.py

Three claims, each a ratio of times taken in turn in this process (dense, routed, dense, routed, ...; medians of the
paired ratios, with quartiles):

(a) all blocks executed, batch-1 decode:        routed / dense                       goal <= 1.00
(b) prefill of 16 prompts of 16..256 tokens:    routed / dense (padded batch)        goal <= real tokens / padded tokens
(c) a quarter of the token visits skipped:      saved / possible                     goal >= 0.95
    saved    = 1 - t(25 % skipped) / t(all-execute)
    possible = blocks' share of the all-execute time x share of the token visits skipped
    blocks' share = 1 - t(every block skipped) / t(all-execute)
    The same paths for all rows, and different ones for each row; prefill (the batch of b) and batch-1 decode.

In (c) both sides are the routed model, so that what (a) and (b) gain does not hide what (c) loses. At decode a batch
of one has one path, so the four rows of a plan are decoded one after the other.
"""

from __future__ import annotations

import contextlib
import copy
import random
import statistics
import time

import pytest
import torch
from transformers import DynamicCache

import drllm_fast  # noqa: F401
from drllm_fast.smollm2 import load_smollm2

ROUNDS = 7
PROMPT_LENGTHS = range(16, 257, 16)
LAYERS = 30
EXECUTE, SKIP = [1] * LAYERS, [0] * LAYERS


@pytest.fixture(scope="module")
def models():
    dense, tokenizer = load_smollm2(torch.bfloat16)
    routed = copy.deepcopy(dense)
    routed.enable_dynamic_routing(EXECUTE)
    return dense, routed


@pytest.fixture(scope="module")
def batch():
    """16 rows of 16 to 256 tokens, left-padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(len(PROMPT_LENGTHS), max(PROMPT_LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(PROMPT_LENGTHS):
        ids[row, -n:] = torch.randint(100, 40_000, (n,), generator=generator)
        mask[row, -n:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def quarter(seed: int) -> list[int]:
    """A path without a quarter of its blocks (7 or 8 of 30, so that the mean is a quarter)."""
    rng = random.Random(seed)
    skipped = set(rng.sample(range(LAYERS), 7 + seed % 2))
    return [0 if layer in skipped else 1 for layer in range(LAYERS)]


@torch.no_grad()
def prefill(model, batch):
    return model(**batch, use_cache=True, logits_to_keep=1)


class Decode:
    """Decode steps of one row at a time, one cache of `tokens` tokens for each path, cut back after each round."""

    def __init__(self, model, paths=(None,), tokens: int = 64, steps: int = 8):
        self.model, self.steps = model, steps // len(paths)
        self.token = torch.tensor([[7]])
        self.caches = [self.prefilled(path, tokens) for path in paths]

    @torch.no_grad()
    def prefilled(self, path, tokens):
        cache = DynamicCache(config=self.model.config)
        ids = torch.randint(100, 40_000, (1, tokens), generator=torch.Generator().manual_seed(1))
        with self.model.routing.using(path) if path else contextlib.nullcontext():
            self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    @torch.no_grad()
    def __call__(self):
        for cache in self.caches:
            for _ in range(self.steps):
                self.model(self.token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.crop(-self.steps)


def interleaved(variants: dict, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each variant, measured in turn: the machine's drift meets all of them alike."""
    for run in variants.values():
        run()
    times = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        for name in names if turn % 2 else reversed(names):
            start = time.perf_counter()
            variants[name]()
            times[name].append(time.perf_counter() - start)
    return times


def ratios(over: list[float], under: list[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def spread(values: list[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.3f} [{low:.3f}, {high:.3f}]"


def report(benchmark, run, **rows) -> None:
    """Put the side-by-side rows into the benchmark's record, and let pytest-benchmark time the routed variant alone."""
    benchmark.extra_info.update(rows, torch=torch.__version__, threads=torch.get_num_threads(), dtype="bfloat16")
    for name, row in rows.items():
        print(f"\n    {name}: {row}", end="")
    benchmark.pedantic(run, rounds=3)


@pytest.mark.parametrize("tokens", [64, 256])
def bench_decode_all_execute(benchmark, models, tokens):
    """(a)"""
    dense, routed = models
    steps = {"dense": Decode(dense, tokens=tokens), "routed": Decode(routed, [EXECUTE], tokens=tokens)}
    times = interleaved(steps, 5 * ROUNDS)
    ratio = ratios(times["routed"], times["dense"])
    report(benchmark, steps["routed"], ratio=spread(ratio), goal="<= 1.00")


def bench_prefill_of_16_prompts(benchmark, models, batch):
    """(b)"""
    dense, routed = models
    expected, actual = prefill(dense, batch).logits, prefill(routed, batch).logits
    assert (expected.argmax(-1) == actual.argmax(-1)).float().mean() > 0.9  # bf16: near ties may fall either way
    times = interleaved({"dense": lambda: prefill(dense, batch), "routed": lambda: prefill(routed, batch)})
    real = batch["attention_mask"].float().mean().item()
    ratio = ratios(times["routed"], times["dense"])
    report(benchmark, lambda: prefill(routed, batch), ratio=spread(ratio), goal=f"<= {real:.3f} (real / padded tokens)")


def routed_prefill(model, batch, plan):
    def run():
        with model.routing.using(plan):
            prefill(model, batch)

    return run


@pytest.mark.parametrize("paths", ["same", "different"])
def bench_saving_at_prefill(benchmark, models, batch, paths):
    """(c)"""
    _, routed = models
    rows = len(PROMPT_LENGTHS)
    plan = [quarter(0 if paths == "same" else row) for row in range(rows)]
    variants = {
        "all": routed_prefill(routed, batch, EXECUTE),
        "none": routed_prefill(routed, batch, SKIP),
        "some": routed_prefill(routed, batch, plan),
    }
    times = interleaved(variants)
    tokens = torch.tensor(list(PROMPT_LENGTHS), dtype=torch.float)
    skipped = 1 - float((torch.tensor(plan).float().mean(1) * tokens).sum() / tokens.sum())
    report(benchmark, variants["some"], **saving(times, skipped))


@pytest.mark.parametrize("paths", ["same", "different"])
def bench_saving_at_decode(benchmark, models, paths):
    """(c)"""
    _, routed = models
    plans = [quarter(0)] * 4 if paths == "same" else [quarter(row) for row in range(4)]
    variants = {
        "all": Decode(routed, [EXECUTE] * 4),
        "none": Decode(routed, [SKIP] * 4),
        "some": Decode(routed, plans),
    }
    times = interleaved(variants, 5 * ROUNDS)
    skipped = 1 - statistics.mean(sum(plan) / LAYERS for plan in plans)
    report(benchmark, variants["some"], **saving(times, skipped))


def saving(times: dict[str, list[float]], skipped: float) -> dict[str, str]:
    share = [1 - r for r in ratios(times["none"], times["all"])]
    saved = [1 - r for r in ratios(times["some"], times["all"])]
    possible = statistics.median(share) * skipped
    return {
        "visits_skipped": f"{skipped:.3f}",
        "blocks_share": spread(share),
        "time_saved": spread(saved),
        "realised": f"{statistics.median(saved) / possible:.3f} of {possible:.3f}",
        "goal": ">= 0.95",
    }
