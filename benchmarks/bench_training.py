"""Training routers as it was published against training on stored windows: the same prompts, labels and routers.

    DRLLM_FAST_DATA=FOLDER pytest benchmarks/bench_training.py -s --benchmark-disable

SmolLM2-135M-Instruct; prompts of FOLDER/arc_easy.train.jsonl.gz (without DRLLM_FAST_DATA, pieces of the bundled text),
each with a label that skips one to three blocks and repeats none or one. In every round all rows run in turn:

    as published   an epoch: every prompt by itself (batch 1) through the frozen model along its label, without
                   gradients; at each block a router of two linear layers on one window after the other, in Python; a
                   step of AdamW every 16 prompts
    one pass       `pool_examples`: every prompt once through the frozen model, packed
    the epochs     `fit` on its windows, all of its epochs

The table gives medians of seconds for a prompt and an epoch, and what follows for a training of the published size:
25 epochs over 2,000 prompts.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from drllm_fast.influence import calibration_texts
from drllm_fast.ops import router_windows
from drllm_fast.routers import LayerRouters
from drllm_fast.search.tasks import load_task
from drllm_fast.search.tokens import encode_context
from drllm_fast.smollm2 import load_smollm2
from drllm_fast.training.fit import fit
from drllm_fast.training.fit_config import FitConfig
from drllm_fast.training.windows import pool_examples

PROMPTS, ROUNDS, BATCH, WINDOWS = 64, 5, 16, 8
EPOCHS, PUBLISHED_PROMPTS = 25, 2000
GAMMA = 2.0


def texts(count):
    if folder := os.environ.get("DRLLM_FAST_DATA"):
        return [item.prompt for item in load_task(str(Path(folder) / "arc_easy.train.jsonl.gz"), limit=count)]
    words = " ".join(calibration_texts()).split()
    return [" ".join(words[start : start + 20 + start % 7]) for start in range(0, 10 * count, 10)]


def labels(count, layers, seed=0):
    rng, found = random.Random(seed), []
    for _ in range(count):
        path, blocks = [1] * layers, rng.sample(range(layers), 4)
        for block in blocks[: rng.randint(1, 3)]:
            path[block] = 0
        path[blocks[3]] = rng.choice((1, 2))
        found.append(path)
    return torch.tensor(found, dtype=torch.int8)


class Taught(nn.Module):
    """A frozen block behind its router: it reads what enters, the block runs as often as the label says."""

    def __init__(self, block, hidden_size, router_size):
        super().__init__()
        self.block = block
        self.router = nn.Sequential(
            nn.Linear(hidden_size, router_size), nn.GELU(approximate="tanh"), nn.Linear(router_size, 3)
        )
        self.times, self.logits = 1, None

    def forward(self, hidden, *args, **kwargs):
        tokens = hidden.shape[1]
        windows = min(WINDOWS, tokens)
        size = tokens // windows
        each = []
        for w in range(windows):
            mean = hidden[:, w * size : (w + 1) * size].float().mean(1)
            each.append(self.router(mean.detach()))
        self.logits = torch.stack(each).mean(0)
        with torch.no_grad():
            for _ in range(self.times):
                hidden = self.block(hidden, *args, **kwargs)
        return hidden


class Published:
    """The model with its routers, trained through it."""

    def __init__(self, model, routers):
        self.base = model.model
        self.blocks = [Taught(block, routers.hidden_size, routers.router_size) for block in self.base.layers]
        with torch.no_grad():
            for layer, taught in enumerate(self.blocks):
                own = (routers.w1, routers.b1, routers.w2, routers.b2)
                for parameter, stacked in zip(taught.router.parameters(), own, strict=True):
                    parameter.copy_(stacked[layer])
        parameters = [parameter for taught in self.blocks for parameter in taught.router.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)

    def logits(self, prompt, label):
        """[L, 3]"""
        blocks = self.base.layers
        for taught, times in zip(self.blocks, label.tolist(), strict=True):
            taught.times = times
        self.base.layers = nn.ModuleList(self.blocks)
        try:
            self.base(input_ids=torch.tensor([prompt]), use_cache=False)
        finally:
            self.base.layers = blocks
        return torch.cat([taught.logits for taught in self.blocks])

    def epoch(self, prompts, plans):
        for number, (prompt, label) in enumerate(zip(prompts, plans, strict=True), 1):
            logp = self.logits(prompt, label).log_softmax(-1).gather(1, label.long().unsqueeze(1))
            loss = -((1 - logp.exp()) ** GAMMA * logp).mean()
            (loss / BATCH).backward()
            if number % BATCH == 0 or number == len(prompts):
                self.optimizer.step()
                self.optimizer.zero_grad()


def seconds_of(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def quartiles(values):
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def bench_training(dtype, benchmark):
    model, tokenizer = load_smollm2(dtype)
    prompts = [encode_context(tokenizer, text, choices=True) for text in texts(PROMPTS)]
    plans = labels(len(prompts), len(model.model.layers))
    config = FitConfig(epochs=EPOCHS, batch_size=BATCH, validation=0.0, balance="none")

    def fresh():
        return LayerRouters.for_model(model, windows=WINDOWS, generator=torch.Generator().manual_seed(0))

    def one_pass():
        return pool_examples(model, prompts, plans, windows=WINDOWS, progress=False)

    def epochs(stored):
        return fit(fresh(), stored, plans, config=config, progress=False)

    published, routers, stored = Published(model, fresh()), fresh(), one_pass()
    weights = (routers.w1, routers.b1, routers.w2, routers.b2)
    with torch.no_grad():  # before anything is timed: both see the same
        theirs = torch.stack([published.logits(*pair) for pair in zip(prompts[:4], plans[:4], strict=True)], 1)
        ours = router_windows(stored.pooled[:, :4], stored.counts[:4], *weights)
    scale = theirs.abs().max()
    assert F.mse_loss(ours, theirs) ** 0.5 < scale * (1e-4 if dtype == torch.float32 else 0.05)
    epochs(stored)

    each = {"as published": [], "one pass": [], "the epochs": []}
    for turn in range(ROUNDS):
        rows = [
            ("as published", lambda: published.epoch(prompts, plans), 1),
            ("one pass", one_pass, 1),
            ("the epochs", lambda: epochs(stored), EPOCHS),
        ]
        for name, run, passes in rows[:: 1 if turn % 2 else -1]:
            each[name].append(seconds_of(run)[0] / passes / len(prompts))
    lengths = [len(prompt) for prompt in prompts]
    print(f"\n{len(prompts)} prompts of {statistics.mean(lengths):.1f} tokens, {dtype}, {ROUNDS} rounds")
    print("| seconds | for a prompt and an epoch, median | for 25 epochs over 2,000 prompts | share |")
    print("|---|---:|---:|---:|")
    whole = {name: [EPOCHS * PUBLISHED_PROMPTS * s for s in seconds] for name, seconds in each.items()}
    whole["one pass"] = [s / EPOCHS for s in whole["one pass"]]
    whole["ours"] = [a + b for a, b in zip(whole["one pass"], whole["the epochs"], strict=True)]
    for name, totals in whole.items():
        own = statistics.median(each[name]) if name in each else statistics.median(totals) / EPOCHS / PUBLISHED_PROMPTS
        share = "" if name == "as published" else f"{statistics.median(totals) / statistics.median(whole['ours']):.2f}"
        print(f"| {name} | {own:.2g} | {statistics.median(totals):.1f} | {share} |")
    ratios = [a / b for a, b in zip(whole["as published"], whole["ours"], strict=True)]
    print(f"projected ratio: {quartiles(ratios)}")
    benchmark.pedantic(one_pass, rounds=1)
