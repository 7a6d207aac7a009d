"""Ops and planner under arguments that are nearly right, or not at all: a right result or a refusal, never a crash, and
nothing is written but the result.

Arguments are made right, in memory in any way that a tensor can lie, and then changed in up to two places. They go to
the public function, and to the op below it, which checks what it would otherwise read or write out of bounds. Results
are compared with the reference, as closely as says that it is the same formula; how exact the kernels are is for the
tests of each op. Each tensor lies between canaries, which are NaN, or -1.
"""

import random
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drllm_fast import attention_reference, ops, planner, planner_reference, router_reference, rows_reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DTYPES = [*FLOATS, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64]
REFUSALS = (TypeError, ValueError, RuntimeError)  # and NotImplementedError, which is a RuntimeError
INTEGERS = [-(2**63), -(2**31), -129, -2, -1, 0, 1, 2, 127, 128, 2**31 - 1, 2**31, 2**62, 2**63 - 1]
NUMBERS = [*map(float, "nan inf -inf 1e-300 1e300 -1 0 1".split()), "1", None]
BIG = 1 << 12  # sizes from here to OVERFLOW are left out: they would be allocated, and filled
OVERFLOW = 1 << 60


def tensor(draw, shape, dtype):
    values = [draw.gauss(0, 1) for _ in range(int(np.prod(shape)))]
    scale = 1 if dtype.is_floating_point or dtype.is_complex else 9
    return (torch.tensor(values).reshape(shape) * scale).to(dtype)


def anything(draw, instead_of):
    """A tensor for a tensor, else a number, or what is none."""
    if not isinstance(instead_of, torch.Tensor):
        return draw.choice([*INTEGERS, *NUMBERS])
    return tensor(draw, [draw.randint(0, 9) for _ in range(draw.randint(0, 4))], draw.choice(DTYPES))


def changed(draw, value):
    if not isinstance(value, torch.Tensor):
        return anything(draw, value)
    kind = draw.choice(["value", "value", "dtype", "size", "dimension", "anything"])
    if kind == "dtype":
        return (value.real if value.is_complex() else value).to(draw.choice(DTYPES))
    if kind == "dimension":
        return value[0] if value.ndim and len(value) and draw.random() < 0.5 else value[None]
    if kind == "size" and value.ndim:
        by = draw.randrange(value.ndim)
        return value.narrow(by, 0, draw.randint(0, value.shape[by])) if draw.random() < 0.7 else torch.cat([value] * 2)
    if kind == "value" and value.numel() and value.dtype != torch.bool:
        value = value.clone()
        floating = value.is_floating_point() or value.is_complex()
        allowed = NUMBERS[:8] if floating else [n for n in INTEGERS if -(2**63) <= n < 2**63]
        at = draw.randrange(value.numel())
        value.view(-1)[at] = torch.tensor(draw.choice(allowed)).to(value.dtype)
        return value
    return anything(draw, value)


def placed(draw, t):
    """t somewhere in a larger memory, and that memory: any order of dimensions, steps, offset, a repeated row."""
    if t.dtype == torch.float32 and draw.random() < 0.05:
        whole = torch.complex(torch.ones_like(t), -t)
        return whole.conj().imag, whole  # a view with the negative bit
    strides, size = [0] * t.ndim, 1
    plain = draw.random() < 0.4
    for dim in reversed(range(t.ndim)) if plain else draw.sample(range(t.ndim), t.ndim):
        strides[dim] = size * (1 if plain else draw.choice([1, 1, 2, 3]))
        size = max(strides[dim] * t.shape[dim], 1)
    if t.ndim and draw.random() < 0.05:
        dim = draw.randrange(t.ndim)
        strides[dim] = 0
        t = t.narrow(dim, 0, min(1, t.shape[dim])).expand_as(t)
    offset, spare = draw.choice([0, 1, 5]), draw.choice([0, 3])
    last = offset + sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True)) + 1
    whole = torch.full(((max(last, offset) + spare) * t.element_size(),), 255, dtype=torch.uint8).view(t.dtype)
    view = whole.as_strided(t.shape, strides, offset)
    written = view
    for dim, stride in enumerate(strides):
        if stride == 0:
            written, t = (x.narrow(dim, 0, min(1, x.shape[dim])) for x in (written, t))
    written.copy_(t)
    return view.conj() if t.is_complex() and draw.random() < 0.3 else view, whole


def bits(t):
    return t.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def outcome(function, *arguments):
    """What it returns, or with what it refuses."""
    try:
        return function(*arguments)
    except REFUSALS as refusal:
        return refusal


def refused(result):
    return isinstance(result, Exception)


def no_number_of_the_op(result):
    """Whether torch refused a number before it came to the op: a float, say, where an integer is due."""
    return isinstance(result, RuntimeError) and "Expected a value of type" in str(result)


# -- right arguments, in the order of the op ---------------------------------------------------------------------------
def some_batch(draw):
    lengths = [draw.randint(0, 4) for _ in range(draw.randint(0, 5))]
    decisions = [draw.choice([0, 1, 2, 1, 2, 127, -128]) for _ in lengths]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return torch.tensor(decisions, dtype=torch.int8), ends, sum(lengths)


def for_active(draw):
    return [*some_batch(draw)[:2], draw.randint(0, 3)]


def for_visits(draw):
    decisions, ends, tokens = some_batch(draw)
    return [decisions, ends, tokens + draw.randint(0, 3)]


def some_rows(draw, dtypes, unique):
    rows, columns, dtype = draw.randint(0, 9), draw.randint(0, 9), draw.choice(dtypes)
    index = draw.sample(range(rows), draw.randint(0, rows)) if unique else draw.choices(range(-1, rows), k=rows)
    index += [-1] * draw.randint(0, 2)
    draw.shuffle(index)
    return tensor(draw, [rows, columns], dtype), torch.tensor(index, dtype=torch.int64)


def for_gather(draw):
    return [*some_rows(draw, DTYPES, False)]


def for_scatter(draw, dtypes=DTYPES):
    x, index = some_rows(draw, dtypes, True)
    return [x, index, tensor(draw, [len(index), x.shape[1]], x.dtype)]


def for_add(draw):
    return for_scatter(draw, FLOATS)


def for_norm(draw):
    x, index = some_rows(draw, FLOATS, False)
    return [x, index, tensor(draw, [x.shape[1]], x.dtype), draw.choice([1e-6, 1e-5, 1.0])]


def for_router(draw):
    _, ends, tokens = some_batch(draw)
    d, h = draw.choice([0, 1, 3, 8, 9, 33]), draw.choice([0, 1, 3, 9, 35])
    x, w1, b1, w2, b2, cost = (tensor(draw, s, torch.float32) for s in ([tokens, d], [h, d], [h], [3, h], [3], [3]))
    return [x.to(draw.choice(FLOATS)), ends, w1, b1, w2.to(draw.choice(FLOATS)), b2, cost, draw.randint(1, 9)]


def for_windows(draw):
    layers, rows, windows, d, h = (draw.randint(0, 4) for _ in range(5))
    shapes = [layers, rows, windows, d], [layers, h, d], [layers, h], [layers, 3, h], [layers, 3]
    pooled, *weights = (tensor(draw, s, torch.float32) for s in shapes)
    return [pooled, torch.tensor([draw.randint(0, windows) for _ in range(rows)], dtype=torch.int64), *weights]


def for_attention(draw):
    total = [draw.randint(0, 9) for _ in range(draw.randint(0, 4))]
    if draw.random() < 0.3:
        total = [n * 20 for n in total]
    new = [min(n, draw.choice([0, 1, 1, n, draw.randint(0, n)])) for n in total]
    gaps = [draw.randint(0, 2) for _ in total]
    starts = [end - n for end, n in zip(accumulate(map(sum, zip(total, gaps, strict=True))), total, strict=True)]
    size = max([s + n for s, n in zip(starts, total, strict=True)], default=0) + draw.randint(0, 2)
    kv_heads, group, dim, dim_v = (
        draw.choice(s) for s in ([1, 2], [0, 1, 2, 3, 4, 6], [0, 1, 3, 8, 16, 32], [0, 5, 16])
    )
    heads, dtype = kv_heads * group, draw.choice([*FLOATS, torch.float32, torch.bfloat16])
    query, keys, values = (
        tensor(draw, s, dtype) for s in ([sum(new), heads, dim], [kv_heads, size, dim], [kv_heads, size, dim_v])
    )
    layout = [torch.tensor(n, dtype=torch.int32) for n in ([0, *accumulate(new)], starts, total)]
    sinks = tensor(draw, [heads], draw.choice(FLOATS)) if draw.random() < 0.3 else None
    window, softcap = draw.choice([None, None, 1, 3, 70, 2**63 - 1]), draw.choice([None, None, 0.5, 30.0])
    longest = max(new, default=0), max(total, default=0)
    return [query, keys, values, *layout, *longest, draw.choice([0.3, -1.0, None]), window, softcap, sinks]


def reference_router(*arguments):
    router_reference.check_router(*arguments)
    return router_reference.router(*arguments)


def reference_windows(*arguments):
    router_reference.check_router_windows(*arguments)
    return router_reference.router_windows(*arguments)


def reference_attention(query, *arguments):
    arguments = [query, *arguments]
    if arguments[8] is None:  # the scale
        arguments[8] = query.shape[-1] ** -0.5 if query.ndim and query.shape[-1] else 1.0
    attention_reference.check_attention(*arguments)
    return attention_reference.ragged_attention(*arguments)


EXACT = ("active_tokens", "visit_rows", "gather_rows", "scatter_rows")
KEYWORDS = {
    "active_tokens": ["at_least"],
    "visit_rows": ["tokens"],
    "gather_rms_norm": ["eps"],
    "router": ["cost", "windows"],
    "ragged_attention": ["max_query", "max_length", "scale", "window", "softcap", "sinks"],
}
OPS = {
    "active_tokens": (for_active, rows_reference.active_tokens),
    "visit_rows": (for_visits, rows_reference.visit_rows),
    "gather_rows": (for_gather, rows_reference.gather_rows),
    "scatter_rows": (for_scatter, rows_reference.scatter_rows),
    "scatter_add_rows": (for_add, rows_reference.scatter_add_rows),
    "gather_rms_norm": (for_norm, rows_reference.gather_rms_norm),
    "router": (for_router, reference_router),
    "router_windows": (for_windows, reference_windows),
    "ragged_attention": (for_attention, reference_attention),
}


def public(op):
    names = KEYWORDS.get(op, [])

    def call(*arguments):
        at = len(arguments) - len(names)
        return getattr(ops, op)(*arguments[:at], **dict(zip(names, arguments[at:], strict=True)))

    return call


def too_large(op, arguments):
    """Whether a right answer would need gigabytes."""
    if op not in ("active_tokens", "visit_rows"):
        return False
    _, ends, size = arguments
    if op == "visit_rows" and isinstance(size, int | float) and BIG < size < OVERFLOW:
        return True
    return isinstance(ends, torch.Tensor) and ends.dtype == torch.int32 and ends.numel() and int(ends.max()) > BIG


def moderate(arguments):
    """Whether all numbers are of a size for which sums in another order are close."""
    floating = [t for t in arguments if isinstance(t, torch.Tensor) and t.is_floating_point()]
    numbers = [t for t in arguments[8:11:2] if t is not None]  # the scale and the soft cap of ragged_attention
    return all(bool((t.abs() <= 99).all()) for t in floating) and all(abs(number) <= 99 for number in numbers)


def compare(op, arguments, result, expected):
    results, wanted = (r if isinstance(r, tuple) else (r,) for r in (result, expected))
    assert len(results) == len(wanted)
    for number, (got, want) in enumerate(zip(results, wanted, strict=True)):
        assert (got.shape, got.dtype) == (want.shape, want.dtype) and got.is_contiguous()
        if op in EXACT or (op == "gather_rms_norm" and number == 0):
            assert torch.equal(bits(got), bits(want))
        elif got.dtype != torch.int8 and moderate(arguments):  # a decision may be another where logits are close
            worst = max(
                torch.finfo(t.dtype).eps for t in arguments if isinstance(t, torch.Tensor) and t.dtype in FLOATS
            )
            torch.testing.assert_close(got, want, rtol=100 * worst, atol=100 * worst, equal_nan=True)


def check(op, draw, arguments):
    if too_large(op, arguments):
        return
    held = [placed(draw, a) if isinstance(a, torch.Tensor) else (a, None) for a in arguments]
    arguments, memory = [view for view, _ in held], [whole for _, whole in held if whole is not None]
    before = [bits(whole).clone() for whole in memory]
    given = outcome(public(op), *arguments)
    below = given
    if op != "router_windows":  # which has no kernel, and checks nothing below the public function
        below = outcome(getattr(torch.ops.drllm_fast, op), *arguments)
    for whole, old in zip(memory, before, strict=True):
        assert torch.equal(bits(whole), old), "an input was written to"
    expected = outcome(OPS[op][1], *arguments)
    if no_number_of_the_op(given):
        return
    assert refused(given) == refused(expected), f"{op} says {given!r}, its reference {expected!r}"
    if refused(expected):
        return
    compare(op, arguments, given, expected)
    if no_number_of_the_op(below):
        return
    if refused(below):  # nothing but what the kernels are not for, which the public function knows
        assert op in ("router", "ragged_attention") and arguments[0].dtype in (torch.float64, torch.float16), below
    else:
        compare(op, arguments, below, expected)


def profile(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


seeds = st.integers(0, 2**32)


@pytest.mark.parametrize("op", OPS)
@profile(600)
@given(seed=seeds, changes=st.sampled_from([0, 1, 1, 1, 2]))
def test_nearly_right(op, seed, changes):
    draw = random.Random(seed)
    arguments = OPS[op][0](draw)
    for _ in range(changes):
        at = draw.randrange(len(arguments))
        if op != "ragged_attention" or at < 11 or arguments[at] is not None:  # sinks are a tensor
            arguments[at] = changed(draw, arguments[at])
    check(op, draw, arguments)


@pytest.mark.parametrize("op", OPS)
@profile(60)
@given(seed=seeds)
def test_anything(op, seed):
    draw = random.Random(seed)
    check(op, draw, [anything(draw, a) for a in OPS[op][0](draw)])


def planned(draw):
    rows, layers = draw.randint(0, 9), draw.randint(0, 5)
    paths = np.array([[draw.randint(0, 2) for _ in range(layers)] for _ in range(rows)]).reshape(rows, layers)
    paths = draw.choice([paths.astype(np.int8), paths, torch.tensor(paths), paths.tolist(), paths.T.copy().T])
    kind = draw.random()
    if kind < 0.2:
        return draw.choice([anything(draw, torch.ones(1)), anything(draw, None)])
    if kind < 0.4 and rows * layers:
        paths = np.array(paths.tolist() if isinstance(paths, torch.Tensor) else paths).astype(np.int64)
        paths[draw.randrange(rows), draw.randrange(layers)] = draw.choice([-1, 3, 127, 256])
        paths = paths.astype(draw.choice([np.int16, np.int64, np.uint64, np.float32, object, bool]))
    return paths[::2] if draw.random() < 0.2 and hasattr(paths, "__len__") and len(paths) else paths


@profile(500)
@given(seed=seeds)
def test_planner(seed):
    draw = random.Random(seed)
    paths, most = planned(draw), draw.choice([1, 2, 3, 2**31, 2**63, 2**70, *INTEGERS, *NUMBERS])
    cost = draw.choice([1.0, 0, 2.5, [1.0], [[1.0, 2.0]] * 3, *NUMBERS, *INTEGERS, 1e308, np.float16(3), "x"])
    for name, arguments in (("decode_plan", ()), ("order_rows", ()), ("group_paths", (most,))):
        options = {"visit_cost": cost, "row_cost": cost} if name == "group_paths" else {}
        results = []
        for implementation in (planner._implementation, planner_reference):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(planner, "_implementation", implementation)
                results.append(outcome(lambda: getattr(planner, name)(paths, *arguments, **options)))  # noqa: B023
        assert refused(results[0]) == refused(results[1]), results
        if refused(results[0]):
            assert isinstance(results[0], TypeError | ValueError)
        elif name == "decode_plan":
            assert results[0] == results[1]
        elif name == "order_rows":
            runs = [planner.count_runs(planner._paths(paths)[order]) if len(order) else 0 for order in results]
            assert sorted(results[0]) == list(range(len(paths))) and runs[0] <= runs[1]
        else:
            with np.errstate(over="ignore"):
                spent = [planner.grouping_cost(paths, batches, visit_cost=cost) for batches in results]
            assert sorted(row for batch in results[0] for row in batch) == list(range(len(paths)))
            assert max(map(len, results[0]), default=0) <= most and spent[0] <= spent[1] * (1 + 1e-9)
