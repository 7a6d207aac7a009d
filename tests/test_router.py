"""The op `router` as the dispatcher runs it (C++ on the CPU where it is compiled), and `router_windows`, against the
formula in fp64.

Shapes come from what csrc/cpu/router_kernel.h counts in: 4, 8 or 16 lanes, four vectors of columns, sums of 64 tokens,
32 hidden units whose GELU is taken together, windows in groups of 1, 2, 4 or 8.
"""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from drllm_fast import ops, router_reference

U = 2.0**-24  # half a unit in the last place of fp32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def offsets(lengths):
    return int32([0, *accumulate(lengths)])


def case(lengths, d, h, *, dtype=torch.float32, seed=0, layers=None):
    """x, cu_seqlens, w1, b1, w2, b2, cost; weights of all layers where `layers` is given."""
    g = torch.Generator().manual_seed(seed)
    stack = () if layers is None else (layers,)

    def draw(*shape):
        return torch.randn(*stack, *shape, generator=g)

    x = torch.randn(sum(lengths), d, generator=g).to(dtype)
    weights = draw(h, d) * d**-0.5, draw(h) / 2, draw(3, h) * h**-0.5, draw(3) / 2
    return x, offsets(lengths), *weights, torch.rand(3, generator=g)


def oracle(x, cu_seqlens, w1, b1, w2, b2, cost, windows):
    """Logits in fp64, and a first-order bound on the error of computing them in fp32.

    A mean of n tokens, summed 64 at a time, is off by at most (64 + n / 64) u mean |x|; a hidden unit, a sum of d
    terms, by that through |w1| and by (d + 2) u of its terms' magnitudes. GELU has a slope of at most 1.13 and costs
    12 u of its argument. The second layer adds (h + windows + 4) u of its terms' magnitudes.
    """
    x, w1, b1, w2, b2, cost = (t.double() for t in (x, w1, b1, w2, b2, cost))
    logits, bounds = [], []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        used = min(windows, end - start)
        if not used:
            logits.append(-cost)
            bounds.append(U * cost.abs())
            continue
        size = (end - start) // used
        tokens = x[start : start + used * size].unflatten(0, (used, size))
        terms = tokens.abs().mean(1) @ w1.abs().T + b1.abs()  # [windows, h]
        inner = tokens.mean(1) @ w1.T + b1
        inner_bound = U * (x.shape[1] + 66 + size / 64) * terms
        out = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
        out_bound = 1.13 * inner_bound + 12 * U * inner.abs()
        logits.append((out @ w2.T + b2).mean(0) - cost)
        magnitude = (out.abs() @ w2.abs().T).mean(0) + b2.abs() + cost.abs()
        bounds.append((out_bound @ w2.abs().T).mean(0) + U * (w1.shape[0] + used + 4) * magnitude)
    if not logits:
        return torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, 3, dtype=torch.float64)
    return torch.stack(logits), torch.stack(bounds)


def check(*arguments, windows):
    *tensors, cost = arguments
    logits, decisions = ops.router(*tensors, windows=windows, cost=cost)
    expected, bound = oracle(*arguments, windows)
    assert logits.dtype == torch.float32 and decisions.dtype == torch.int8
    assert logits.shape == (len(arguments[1]) - 1, 3) and decisions.shape == logits.shape[:1]
    assert ((logits - expected).abs() <= bound).all()
    for (skip, execute, repeat), decision in zip(logits.tolist(), decisions.tolist(), strict=True):
        assert decision == (0 if skip > max(execute, repeat) else 2 if repeat > max(execute, skip) else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 37, 63, 64, 65, 80, 133, 576])
def test_any_width(d, dtype):
    check(*case([9, 17, 1], d, 20, dtype=dtype), windows=8)


@pytest.mark.parametrize("h", [1, 2, 3, 15, 16, 17, 31, 32, 33, 69, 128])
@pytest.mark.parametrize("windows", [1, 2, 3, 4, 5, 7, 8, 9, 16, 21, 32])
def test_any_hidden_width_and_windows(h, windows):
    check(*case([40, 3, 75], 24, h), windows=windows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 127, 128, 133, 1000])
def test_any_window_size(size, dtype):
    for lengths in ([size * 3 + 2], [size, 5, size * 2]):
        check(*case(lengths, 21, 10, dtype=dtype), windows=3)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [3, 0], [0, 9, 0], [700], [900, 0, 1], [65] * 5, [40] * 40])
def test_any_batch(lengths, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*case(lengths, 200, 128), windows=8)
    finally:
        torch.set_num_threads(before)


def test_a_row_does_not_depend_on_its_batch_or_on_threads():
    lengths = [300, 1, 0, 64, 777, 9] * 3
    x, cu_seqlens, *weights = case(lengths, 200, 128)
    *weights, cost = weights
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ops.router(x, cu_seqlens, *weights, windows=8, cost=cost)[0])
        for row, (start, n) in enumerate(zip(cu_seqlens.tolist(), lengths, strict=False)):
            alone = ops.router(x[start : start + n], int32([0, n]), *weights, windows=8, cost=cost)[0]
            torch.set_num_threads(before)
            if ops.EXTENSION_ERROR is None:
                assert torch.equal(alone[0], results[-1][row])
            torch.set_num_threads(threads)
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype):
    x, cu_seqlens, *rest = case([9, 17], 24, 10, dtype=dtype)
    expected = ops.router(x, cu_seqlens, *rest[:4], windows=8)[0]
    apart = torch.cat([x, x + 1], 1)[:, :24]
    for other in (apart, x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2], x.repeat_interleave(3, 0)[::3]):
        assert torch.equal(ops.router(other, cu_seqlens, *rest[:4], windows=8)[0], expected)
    turned = [t.t().contiguous().t() if t.ndim == 2 else t.repeat_interleave(2)[::2] for t in rest[:4]]
    twice = cu_seqlens.repeat_interleave(2)[::2]
    assert torch.equal(ops.router(x, twice, *turned, windows=8)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_types(dtype):
    arguments = case([9, 17], 24, 10)
    rounded = [t.to(dtype) if t.is_floating_point() and i else t for i, t in enumerate(arguments)]
    check(*rounded, windows=8)


def test_fp64_input_is_computed_in_fp32_by_the_reference():
    arguments = case([9, 17], 24, 10)
    check(arguments[0].double(), *arguments[1:], windows=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(dtype):
    """Subnormal and large numbers; GELU far from 0, where its tails are 0 and the identity."""
    x, cu_seqlens, w1, b1, w2, b2, cost = case([5], 16, 8, dtype=dtype)
    for scale in (1e-30, 1e-6, 40.0):
        check(x * torch.tensor(scale).to(dtype), cu_seqlens, w1 * 50, b1, w2, b2, cost, windows=2)
    tiny = torch.full((4, 16), torch.finfo(dtype).tiny, dtype=dtype) / 4
    assert dtype == torch.float32 or tiny.any()
    check(tiny, int32([0, 4]), torch.full_like(w1, 1e6), b1 * 0, w2, b2, cost, windows=2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 20, 33])
def test_what_is_not_finite_shows_and_executes(value, at):
    x, cu_seqlens, *weights, cost = case([17, 17, 17], 40, 128)
    x[at, 5] = value
    logits, decisions = ops.router(x, cu_seqlens, *weights, windows=8)
    hit = torch.zeros(3, dtype=torch.bool)
    if at != 33:  # the last token of the second row belongs to no window
        hit[at // 17] = True
    assert torch.equal(~logits.isfinite().all(1), hit)
    assert (decisions[hit & logits.isnan().any(1)] == 1).all()


def test_a_tie_executes():
    x, cu_seqlens, w1, b1, w2, b2, _ = case([9], 8, 4)
    flat = torch.zeros_like(w2)
    for bias, decision in (
        ([1, 1, 1], 1), ([1, 1, 0], 1), ([0, 1, 1], 1), ([1, 0, 1], 1), ([1, 0, 0], 0), ([0, 0, 1], 2), ([0, 1, 0], 1),
    ):  # fmt: skip
        logits, decisions = ops.router(x, cu_seqlens, w1, b1, flat, torch.tensor(bias).float(), windows=8)
        assert logits.tolist() == [bias] and decisions.tolist() == [decision]


def test_the_cost_is_subtracted_before_the_decision():
    arguments = case([9, 30], 8, 4)[:6]
    plain, _ = ops.router(*arguments, windows=8)
    for cost, decision in (([0, 9, 9], 0), ([9, 0, 9], 1), ([9, 9, 0], 2)):
        cost = torch.tensor(cost).float()
        logits, decisions = ops.router(*arguments, windows=8, cost=cost)
        assert torch.equal(logits, plain - cost) and decisions.tolist() == [decision] * 2


GOOD = case([3, 4], 5, 6)
REFUSED = [
    ({0: GOOD[0].long()}, TypeError, "x must be floating, got torch.int64"),
    ({0: GOOD[0][None]}, ValueError, r"x must be \[T, d\]"),
    ({0: GOOD[0][:, :4]}, ValueError, r"w1, b1, w2, b2 of a layer must be \[h, 4\]"),
    ({0: GOOD[0][:6]}, ValueError, "cu_seqlens must rise from 0 to the 6 tokens"),
    ({1: GOOD[1].long()}, TypeError, "cu_seqlens must be int32"),
    ({1: GOOD[1][:0]}, ValueError, r"cu_seqlens \[B \+ 1\]"),
    ({1: GOOD[1][None]}, ValueError, r"cu_seqlens \[B \+ 1\]"),
    ({1: int32([1, 7])}, ValueError, "cu_seqlens must rise from 0"),
    ({1: int32([0, 5, 4, 7])}, ValueError, "cu_seqlens must"),
    ({1: int32([0, -1, 7])}, ValueError, "cu_seqlens must"),
    ({1: int32([0, 2**31 - 1])}, ValueError, "cu_seqlens must"),
    ({2: GOOD[2].long()}, TypeError, "w1 must be floating"),
    ({2: GOOD[2][0]}, ValueError, "w1, b1, w2, b2"),
    ({3: GOOD[3][:5]}, ValueError, "w1, b1, w2, b2"),
    ({4: GOOD[4][:2]}, ValueError, "w1, b1, w2, b2"),
    ({5: GOOD[5][:2]}, ValueError, "w1, b1, w2, b2"),
    ({6: GOOD[6][:2]}, ValueError, r"cost must be \[3\]"),
    ({6: GOOD[6].to("meta")}, ValueError, "x is on cpu, cost on meta"),
    ({"windows": 0}, ValueError, "windows must be at least 1"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_refusals(change, error, message):
    arguments = [change.get(i, t) for i, t in enumerate(GOOD)]
    with pytest.raises(error, match=message):
        ops.router(*arguments[:6], cost=arguments[6], windows=change.get("windows", 8))
    if ops.EXTENSION_ERROR or any(isinstance(t, torch.Tensor) and t.is_meta for t in change.values()):
        return  # there is no kernel; the call would be faked
    with pytest.raises((error, ValueError, RuntimeError)):  # the kernel checks for itself
        torch.ops.drllm_fast.router(*arguments, change.get("windows", 8))


def differentiable(arguments):
    return [t.requires_grad_() if t.is_floating_point() else t for t in arguments]


@pytest.mark.parametrize("lengths", [[], [5, 0, 31, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(lengths, dtype):
    opcheck(torch.ops.drllm_fast.router.default, (*differentiable(case(lengths, 7, 5, dtype=dtype)), 8))
    x, _, *weights = case([4] * len(lengths), 7, 5, layers=3)
    pooled, counts = torch.randn(3, len(lengths), 8, 7).to(dtype), torch.tensor([8, 0, 3, 1][: len(lengths)])
    opcheck(torch.ops.drllm_fast.router_windows.default, (*differentiable([pooled, counts, *weights[:4]]),))


def gradcheck(function, arguments):
    # Everything is computed in fp32: steps of 1e-2 are as exact as that allows.
    assert torch.autograd.gradcheck(function, arguments, eps=1e-2, atol=2e-3, rtol=1e-2)


def test_gradients_of_the_router():
    def in_fp32(*tensors):
        single = (t.float() if t.is_floating_point() else t for t in tensors)
        return torch.ops.drllm_fast.router(*single, 4)[0].double()

    arguments = [t.double() if t.is_floating_point() else t for t in case([5, 0, 19], 4, 3)]
    gradcheck(in_fp32, differentiable(arguments))


def test_gradients_are_those_of_the_reference():
    results = []
    for run in (torch.ops.drllm_fast.router, router_reference.router):
        arguments = differentiable(case([5, 0, 190], 33, 20))
        run(*arguments, 8)[0].square().sum().backward()
        results.append([t.grad for t in arguments if t.is_floating_point()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def pooled_case(layers=3, rows=4, windows=8, d=21, h=10):
    *_, w1, b1, w2, b2, _ = case([1], d, h, layers=layers)
    pooled = torch.randn(layers, rows, windows, d, generator=torch.Generator().manual_seed(2))
    return pooled, torch.tensor([8, 0, 3, 1])[:rows], w1, b1, w2, b2


def test_all_layers_on_stored_windows():
    pooled, counts, *weights = pooled_case()
    pooled[:, 2, 3:], pooled[:, 1] = torch.nan, torch.nan  # windows that no row uses
    logits = ops.router_windows(pooled, counts, *weights)
    assert logits.shape == (3, 4, 3) and logits.dtype == torch.float32
    for layer in range(3):
        w1, b1, w2, b2 = (w[layer].double() for w in weights)
        for row, used in enumerate(counts.tolist()):
            inner = F.gelu(pooled[layer, row, :used].double() @ w1.T + b1, approximate="tanh")
            expected = (inner @ w2.T + b2).mean(0) if used else torch.zeros(3, dtype=torch.float64)
            torch.testing.assert_close(logits[layer, row].double(), expected, atol=2e-6, rtol=2e-6)


def test_gradients_of_the_stored_windows():
    arguments = [t.double() if t.is_floating_point() else t for t in pooled_case(2, 3, 8, 3, 4)]
    gradcheck(torch.ops.drllm_fast.router_windows.default, differentiable(arguments))


def test_the_input_gets_no_gradient_that_nobody_asked_for():
    pooled, counts, *weights = pooled_case()
    x, cu_seqlens, *single = case([5, 0, 190], 33, 20)
    for run, given, rest in (
        (lambda x, *w: ops.router_windows(x, counts, *w), pooled, weights),
        (lambda x, *w: torch.ops.drllm_fast.router(x, cu_seqlens, *w, 8)[0], x, single),
    ):
        grads, work = [], []
        for asked in (True, False):
            given = given.detach().requires_grad_(asked)
            inputs = [w.detach().requires_grad_() for w in rest]
            loss = run(given, *inputs).square().sum()
            with FlopCounterMode(display=False) as counter:
                loss.backward()
            grads.append([w.grad for w in inputs])
            work.append(counter.get_total_flops())
            assert (given.grad is not None) == asked
        for with_input, without in zip(*grads, strict=True):
            assert torch.equal(with_input, without)
        assert work[1] < 0.75 * work[0]


def test_no_layers_on_stored_windows():
    pooled, counts, *weights = pooled_case()
    assert ops.router_windows(pooled[:0], counts, *(w[:0] for w in weights)).shape == (0, 4, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_windows_than_memory(dtype):
    arguments = case([9, 17], 24, 10)
    check(arguments[0].to(dtype), *arguments[1:], windows=2**62)


def test_what_is_pooled_and_stored_gives_the_router_its_logits():
    x, cu_seqlens, *weights, _ = case([5, 0, 31, 8], 21, 10)
    pooled, counts = router_reference.pool_windows(x, cu_seqlens, 8)
    stored = ops.router_windows(pooled[None], counts, *(w[None] for w in weights))[0]
    torch.testing.assert_close(stored, ops.router(x, cu_seqlens, *weights, windows=8)[0], atol=2e-6, rtol=2e-6)


STORED = pooled_case()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({0: STORED[0].long()}, TypeError),
        ({0: STORED[0][0]}, ValueError),
        ({0: STORED[0][:2]}, ValueError),
        ({0: STORED[0][..., :20]}, ValueError),
        ({1: STORED[1].float()}, TypeError),
        ({1: STORED[1][:3]}, ValueError),
        ({2: STORED[2][:, :9]}, ValueError),
        ({2: STORED[2][:, 0, 0]}, ValueError),
        ({4: STORED[4][0, 0, 0]}, ValueError),
        ({5: STORED[5][:, :2]}, ValueError),
        ({5: STORED[5].to("meta")}, ValueError),
    ],
)
def test_stored_windows_refused(change, error):
    with pytest.raises(error):
        ops.router_windows(*(change.get(i, t) for i, t in enumerate(STORED)))


def test_one_graph_for_all_shapes():
    torch._dynamo.reset()

    def both(x, cu_seqlens, w1, b1, w2, b2, cost, pooled, counts):
        logits, decisions = ops.router(x, cu_seqlens, w1, b1, w2, b2, windows=8, cost=cost)
        return logits, decisions, ops.router_windows(pooled, counts, w1[None], b1[None], w2[None], b2[None])

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, d, h in (([2, 3], 8, 4), ([4, 0, 5], 8, 4), ([70], 24, 6), ([7, 1, 2, 3], 24, 6)):
        arguments = differentiable(case(lengths, d, h))
        pooled, counts = router_reference.pool_windows(arguments[0].detach(), arguments[1], 8)
        results = [f(*arguments, pooled[None], counts) for f in (compiled, both)]
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)
        grads = [torch.autograd.grad(r[0].square().sum() + r[2].sum(), arguments[2:6]) for r in results]
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.skipif(ops.EXTENSION_ERROR is not None, reason=f"no extension: {ops.EXTENSION_ERROR}")
def test_the_kernel_is_in_front_of_the_reference():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("drllm_fast::router", "CPU")
