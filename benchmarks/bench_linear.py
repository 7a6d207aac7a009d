"""Linear layers of SmolLM2's shapes, few rows at a time: a decode step has one row for each prompt.

    pytest benchmarks/bench_linear.py

Each call has another layer's weights, as in a model, whose weights do not fit into a cache together.

torch   torch.nn.functional.linear
packed  the op `packed_linear`, with weights that `pack_linear` laid out beforehand
"""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from drllm_fast import ops

SHAPES = [(576, 576), (576, 1536), (1536, 576), (576, 49152)]  # K, N: attention, into the MLP, out of it, the head
COUNT = 30


@functools.cache
def weights(depth, features, dtype):
    g = torch.Generator().manual_seed(0)
    plain = [torch.randn(features, depth, generator=g).to(dtype) for _ in range(1 if features > 10_000 else COUNT)]
    return plain, [ops.pack_linear(weight) for weight in plain]


@pytest.mark.parametrize("implementation", ["torch", "packed"])
@pytest.mark.parametrize(("K", "N"), SHAPES, ids=lambda n: str(n))
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_linear(race, implementation, dtype, rows, K, N):
    plain, panels = weights(K, N, dtype)
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = [x.double() @ weight.double().T for weight in plain]
    turns = {name: itertools.count() for name in ("torch", "packed")}
    latest = {}

    def call(name, multiply, of):
        def run():
            latest["at"] = next(turns[name]) % len(of)
            return multiply(of[latest["at"]])

        return run

    def check(out):
        want = exact[latest["at"]]
        bound = (K + 2) * 2.0**-24 * (x.double().abs() @ plain[latest["at"]].double().abs().T)
        bound += want.abs() * (2.0**-8 if dtype == torch.bfloat16 else 0)
        assert ((out.double() - want).abs() <= bound).all()

    race(
        {
            "torch": call("torch", lambda w: F.linear(x, w), plain),
            "packed": call("packed", lambda p: ops.packed_linear(x, p, features=N), panels),
        },
        check,
        moved=(N * K + rows * (N + K)) * dtype.itemsize,
        flops=2 * rows * N * K,
        dtype=dtype,
    )
