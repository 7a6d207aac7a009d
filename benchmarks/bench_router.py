"""One forward's worth of routers: 30 blocks (SmolLM2-135M: d = 576, h = 128, 8 windows), one after the other, since
each reads what the block before it wrote.

    pytest benchmarks/bench_router.py

published  the authors' way: a Python loop over blocks and windows, each a mean and two linear layers
batched    the windows of a block as one batch of linear layers
reference  drllm_fast.router_reference
op         the op, C++ on the CPU where it is compiled, Triton on a GPU
"""

import statistics
import time
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import nn

from drllm_fast import LayerRouters, ops, router_reference
from drllm_fast.policies import PromptBatch
from drllm_fast.smollm2 import load_smollm2

LAYERS, D, H, WINDOWS = 30, 576, 128, 8
BATCHES = {
    "128 tokens": [128],
    "16 prompts of 16..256": [16 + 16 * i for i in range(16)],
    "one of 32768": [32768],
    "256 of 8..512": [8 + 2 * i for i in range(256)],
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def weights():
    g = torch.Generator().manual_seed(0)
    shapes = (LAYERS, H, D), (LAYERS, H), (LAYERS, 3, H), (LAYERS, 3)
    return [(torch.randn(s, generator=g) * s[-1] ** -0.5).to(DEVICE) for s in shapes]


def oracle(x, lengths, stacked):
    """numpy, fp64: decisions [LAYERS, B]."""
    x, (w1, b1, w2, b2) = x.double().cpu().numpy(), (w.double().cpu().numpy() for w in stacked)
    out, start = np.zeros((LAYERS, len(lengths), 3)), 0
    for row, n in enumerate(lengths):
        used = min(WINDOWS, n)
        size = n // used
        pooled = x[start : start + used * size].reshape(used, size, D).mean(1)
        inner = np.einsum("wd,lhd->lwh", pooled, w1) + b1[:, None]
        inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        out[:, row] = (np.einsum("lwh,lch->lwc", inner, w2) + b2[:, None]).mean(1)
        start += n
    return out


@pytest.mark.parametrize("implementation", ["published", "batched", "reference", "op"])
@pytest.mark.parametrize("batch", BATCHES)
def bench_router(race, implementation, batch):
    lengths, stacked = BATCHES[batch], weights()
    x = torch.randn(sum(lengths), D, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    layers = [tuple(w[layer] for w in stacked) for layer in range(LAYERS)]
    modules = []
    for w1, b1, w2, b2 in layers:
        module = nn.Sequential(nn.Linear(D, H), nn.GELU(approximate="tanh"), nn.Linear(H, 3)).to(DEVICE)
        module.load_state_dict({"0.weight": w1, "0.bias": b1, "2.weight": w2, "2.bias": b2})
        modules.append(module)

    def published():
        out = []
        for module in modules:
            rows, start = [], 0
            for n in lengths:
                used = min(WINDOWS, n)
                size = n // used
                each = [module(x[start + i * size : start + (i + 1) * size].float().mean(0)) for i in range(used)]
                rows.append(torch.stack(each).mean(0))
                start += n
            out.append(torch.stack(rows))
        return out

    def batched():
        out = []
        for module in modules:
            rows, start = [], 0
            for n in lengths:
                used = min(WINDOWS, n)
                windows = x[start : start + n // used * used].float().view(used, n // used, D).mean(1)
                rows.append(module(windows).mean(0))
                start += n
            out.append(torch.stack(rows))
        return out

    expected = oracle(x, lengths, stacked)

    def check(logits):
        np.testing.assert_allclose(torch.stack(list(logits)).cpu().numpy(), expected, atol=1e-5, rtol=1e-5)

    windows = sum(min(WINDOWS, n) for n in lengths)
    with torch.inference_mode():
        race(
            {
                "published": published,
                "batched": batched,
                "reference": lambda: [router_reference.router(x, cu_seqlens, *w, w[3] * 0, WINDOWS)[0] for w in layers],
                "op": lambda: [ops.router(x, cu_seqlens, *w, windows=WINDOWS)[0] for w in layers],
            },
            check,
            moved=LAYERS * (x.numel() * x.element_size() + 4 * (H * D + 4 * H)),
            flops=LAYERS * (x.numel() + 2 * windows * H * (D + 3)),
        )


@pytest.mark.parametrize("tokens", [128, 512])
def test_share_of_the_forward(capsys, tokens):
    """Routers of all blocks against SmolLM2's forward of one prompt, in turns: the ops alone, one after the other; as
    LayerRouters calls them; and what a forward takes longer with routers that execute everything than with that plan
    given, where the blocks in between have emptied the caches."""
    model, tokenizer = load_smollm2(torch.bfloat16)
    text = "The quick brown fox jumps over the lazy dog. " * 80
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
    routers = LayerRouters.for_model(model)
    with torch.no_grad():
        routers.w2.zero_()
        routers.b2.copy_(torch.tensor([-1.0, 1.0, -1.0]).expand(LAYERS, 3))
    hidden, cu_seqlens = torch.randn(tokens, D).bfloat16(), torch.tensor([0, tokens], dtype=torch.int32)
    prompts = PromptBatch(hidden, cu_seqlens)
    layers = [tuple(p.detach()[layer] for p in routers.parameters()) for layer in range(LAYERS)]
    model.enable_dynamic_routing(routers)

    def given():
        with model.routing.using([1] * LAYERS):
            model(ids)

    def dense():
        with model.routing.disabled():
            model(ids)

    def seconds(function):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    shares = {"ops": [], "LayerRouters.route": [], "in the forward": []}
    with torch.inference_mode():
        for _ in range(40):
            whole = seconds(dense)
            shares["ops"].append(
                seconds(lambda: [ops.router(hidden, cu_seqlens, *w, windows=8) for w in layers]) / whole
            )
            shares["LayerRouters.route"].append(
                seconds(lambda: [routers.route(i, prompts) for i in range(LAYERS)]) / whole
            )
            shares["in the forward"].append((seconds(lambda: model(ids)) - seconds(given)) / whole)
    with capsys.disabled():
        for name, values in shares.items():
            low, median, high = statistics.quantiles(values, n=4)
            print(f"\n{tokens} tokens, {name}: {median:.4f} [{low:.4f}, {high:.4f}] of the forward, goal <= 0.01")
