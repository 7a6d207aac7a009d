"""The row ops against an oracle in plain Python: through the dispatcher (C++ where it is compiled), and the reference
implementation on its own."""

import random

import pytest
import torch
from torch.library import opcheck

from drllm_fast import ops, rows_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex128]
# csrc/cpu/rows.cpp gives a thread 2 ** 17 bytes: this many float32 columns make that 4 rows
ROWS_PER_TASK, WIDE = 4, 2**13


class Reference:
    gather_rows, scatter_rows = rows_reference.gather_rows, rows_reference.scatter_rows

    @staticmethod
    def active_tokens(decisions, cu_seqlens, *, at_least):
        return rows_reference.active_tokens(decisions, cu_seqlens, at_least)


@pytest.fixture(params=[ops, Reference], ids=["dispatched", "reference"])
def implementation(request):
    return request.param


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def int8(*values):
    return torch.tensor(values, dtype=torch.int8)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


def fill(rows, columns, dtype):
    return torch.arange(1, rows * columns + 1).reshape(rows, columns).remainder(251).to(dtype)


def layouts(x):
    """The same values in memory in every way a row can lie: whole, apart, scattered element by element, shifted."""
    yield "contiguous", x
    yield "rows apart", torch.cat([x, x.flip(0)], 1)[:, : x.shape[1]]
    yield "transposed", x.t().contiguous().t()
    yield "every other column", x.repeat_interleave(2, 1)[:, ::2]
    yield "every other row", x.repeat_interleave(2, 0)[::2]
    yield "offset", torch.cat([x[:1], x])[1:]


def oracle_active(decisions, lengths, at_least):
    index, ends, start = [], [0], 0
    for decision, length in zip(decisions, lengths, strict=True):
        if decision >= at_least:
            index += range(start, start + length)
            ends.append(len(index))
        start += length
    return index, ends


def check_active(implementation, decisions, lengths, at_least):
    cu_seqlens = int32(*(sum(lengths[:i]) for i in range(len(lengths) + 1)))
    index, cu_active = implementation.active_tokens(int8(*decisions), cu_seqlens, at_least=at_least)
    assert index.dtype == torch.int64 and cu_active.dtype == torch.int32
    assert (index.tolist(), cu_active.tolist()) == oracle_active(decisions, lengths, at_least)


@pytest.mark.parametrize(
    ("decisions", "lengths"),
    [
        ([], []),
        ([1], [0]),
        ([0], [3]),
        ([2], [1]),
        ([1, 1, 1], [2, 5, 1]),
        ([0, 0, 0], [2, 5, 1]),
        ([1, 0, 2, 1, 0], [3, 2, 4, 1, 7]),
        ([0, 1, 1, 2, 0, 1], [0, 0, 3, 0, 2, 0]),
        ([2, 2], [0, 0]),
        ([127, -128, 1], [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("at_least", [0, 1, 2, 3, 127])
def test_active_tokens(implementation, decisions, lengths, at_least):
    check_active(implementation, decisions, lengths, at_least)


def test_active_tokens_at_random(implementation):
    draw = random.Random(0)
    for rows in range(40):
        decisions = draw.choices([0, 1, 2], k=rows)
        check_active(implementation, decisions, draw.choices([0, 1, 2, 3, 17, 64, 65], k=rows), draw.choice([1, 2]))


def test_active_tokens_of_strided_input(implementation):
    decisions = int8(1, 9, 0, 9, 2, 9)[::2]
    cu_seqlens = int32(0, 9, 2, 9, 3, 9, 7, 9)[::2]
    index, cu_active = implementation.active_tokens(decisions, cu_seqlens, at_least=1)
    assert index.tolist() == [0, 1, 3, 4, 5, 6] and cu_active.tolist() == [0, 2, 6]


INDICES = {
    "none": [],
    "one": [3],
    "ends": [0, 8],
    "all": list(range(9)),
    "runs": [1, 2, 3, 6, 7],
    "backwards": list(range(9))[::-1],
    "mixed": [4, 5, 0, 8, 7, 1],
}


def oracle_scatter(x, index, y):
    rows = x.tolist()
    for to, row in zip(index, y.tolist(), strict=True):
        rows[to] = row
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("columns", [1, 5])
def test_gather_and_scatter(implementation, index, dtype, columns):
    rows = fill(9, columns, dtype)
    new = fill(len(index), columns, dtype).flip(0) if dtype == torch.bool else 2 * fill(len(index), columns, dtype)
    for (name, x), (_, y) in zip(layouts(rows), layouts(new), strict=True):
        before = x.clone()
        for at in (int64(*index), int64(*index, *index)[: len(index)], int64(*index).repeat_interleave(2)[::2]):
            out = implementation.gather_rows(x, at)
            assert out.dtype == dtype and out.is_contiguous(), name
            assert out.tolist() == [rows.tolist()[i] for i in index], name
            out = implementation.scatter_rows(x, at, y)
            assert out.dtype == dtype and out.is_contiguous(), name
            assert out.tolist() == oracle_scatter(rows, index, new), name
            assert out.data_ptr() != x.data_ptr() and torch.equal(x, before), name


def test_layouts_may_differ_between_old_and_new_rows(implementation):
    rows, new, index = fill(9, 5, torch.float32), 2 * fill(3, 5, torch.float32), [2, 3, 7]
    for _, x in layouts(rows):
        for _, y in layouts(new):
            assert implementation.scatter_rows(x, int64(*index), y).tolist() == oracle_scatter(rows, index, new)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (0, 0), (4, 0)])
def test_nothing_to_move(implementation, rows, columns):
    x, every, none = torch.zeros(rows, columns), torch.arange(rows), int64()
    assert implementation.gather_rows(x, none).shape == (0, columns)
    assert implementation.gather_rows(x, every).shape == (rows, columns)
    assert implementation.scatter_rows(x, none, x[:0]).shape == (rows, columns)
    assert implementation.scatter_rows(x, every, x).shape == (rows, columns)


def test_gather_may_repeat_rows(implementation):
    x = fill(3, 2, torch.float32)
    assert implementation.gather_rows(x, int64(2, 2, 0, 2)).tolist() == [x.tolist()[i] for i in (2, 2, 0, 2)]


def test_one_row_in_memory_for_all(implementation):
    x = torch.arange(3.0).expand(4, 3)
    assert implementation.gather_rows(x, int64(0, 1, 3)).tolist() == [[0, 1, 2]] * 3
    out = implementation.scatter_rows(x, int64(1), torch.full((1, 1), 7.0).expand(1, 3))
    assert out.tolist() == [[0, 1, 2], [7, 7, 7], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, WIDE), *((n * ROWS_PER_TASK + e, WIDE) for n in (1, 2, 5) for e in (-1, 0, 1)), (1000, 3)],
)
def test_many_and_wide_rows(implementation, two_threads, rows, columns):
    x = fill(rows, columns, torch.float32)
    index = [i for i in range(rows) if i % 5 != 2]
    assert torch.equal(implementation.gather_rows(x, int64(*index)), torch.stack([x[i] for i in index]))
    out = implementation.scatter_rows(x, int64(*index), -x[: len(index)])
    for i in range(rows):
        assert torch.equal(out[i], x[i] if i % 5 == 2 else -x[index.index(i)])


def meta(x):
    return x.to("meta")


X, Y, INDEX, DECISIONS, ENDS = torch.zeros(4, 3), torch.ones(2, 3), int64(0, 2), int8(1, 0), int32(0, 2, 4)
REFUSED = [
    ("active_tokens", (DECISIONS.int(), ENDS), TypeError, "decisions must be int8, got torch.int32"),
    ("active_tokens", (DECISIONS, ENDS.long()), TypeError, "cu_seqlens must be int32, got torch.int64"),
    ("active_tokens", (DECISIONS, int32(0, 4)), ValueError, r"\[B \+ 1\], got \[2\] and \[2\]"),
    ("active_tokens", (int8(), int32()), ValueError, r"\[B \+ 1\], got \[0\] and \[0\]"),
    ("active_tokens", (DECISIONS[None], ENDS), ValueError, r"decisions must be \[B\]"),
    ("active_tokens", (DECISIONS, ENDS[None]), ValueError, r"decisions must be \[B\]"),
    ("active_tokens", (meta(DECISIONS), ENDS), ValueError, "decisions is on meta, cu_seqlens on cpu"),
    ("active_tokens", (DECISIONS, int32(1, 2, 4)), ValueError, "cu_seqlens must start at 0"),
    ("active_tokens", (DECISIONS, int32(0, 4, 2)), ValueError, "must not fall"),
    ("active_tokens", (int8(0, 0), int32(0, 4, 2)), ValueError, "must not fall"),
    ("gather_rows", (X, INDEX.int()), TypeError, "index must be int64, got torch.int32"),
    ("gather_rows", (X, int64(0, 4)), ValueError, "index"),
    ("gather_rows", (X, int64(0, -1)), ValueError, "index"),
    ("gather_rows", (X[:0], int64(0)), ValueError, "index"),
    ("gather_rows", (X[None], INDEX), ValueError, r"got \[1, 4, 3\] and \[2\]"),
    ("gather_rows", (X, INDEX[None]), ValueError, r"got \[4, 3\] and \[1, 2\]"),
    ("gather_rows", (X, meta(INDEX)), ValueError, "x is on cpu, index on meta"),
    ("scatter_rows", (X, INDEX.short(), Y), TypeError, "index must be int64"),
    ("scatter_rows", (X, INDEX, Y.double()), TypeError, "y must have the dtype of x, got torch.float64"),
    ("scatter_rows", (X, INDEX, Y[:1]), ValueError, r"y must be \[2, 3\].*got \[1, 3\]"),
    ("scatter_rows", (X, INDEX, Y[:, :2]), ValueError, r"y must be \[2, 3\].*got \[2, 2\]"),
    ("scatter_rows", (X, INDEX, Y[0]), ValueError, r"y must be \[2, 3\].*got \[3\]"),
    ("scatter_rows", (X, INDEX, meta(Y)), ValueError, "x is on cpu, y on meta"),
    ("scatter_rows", (X, int64(0, 4), Y), ValueError, "index"),
    ("scatter_rows", (X, int64(-1, 0), Y), ValueError, "index"),
    ("scatter_rows", (X, int64(2, 2), Y), ValueError, "must not name a row twice"),
]


@pytest.mark.parametrize(("op", "arguments", "error", "message"), REFUSED)
def test_refusals(implementation, op, arguments, error, message):
    options = {"at_least": 1} if op == "active_tokens" else {}
    with pytest.raises(error, match=message):
        getattr(implementation, op)(*arguments, **options)


@pytest.mark.parametrize("at_least", [-1, 128, 300])
def test_refused_threshold(implementation, at_least):
    with pytest.raises(ValueError, match=f"at_least must be from 0 to 127, got {at_least}"):
        implementation.active_tokens(DECISIONS, ENDS, at_least=at_least)


@pytest.mark.parametrize(
    ("op", "arguments", "error"),
    [refused[:3] for refused in REFUSED if not any(x.is_meta for x in refused[1])],  # meta tensors would be faked
)
def test_refusals_below_the_public_functions(op, arguments, error):
    """A kernel checks for itself what it would otherwise read or write out of bounds."""
    with pytest.raises((error, RuntimeError)):
        getattr(torch.ops.drllm_fast, op)(*arguments, *([1] if op == "active_tokens" else []))


OPCHECKED = [
    ("active_tokens", lambda: (int8(1, 0, 2), int32(0, 2, 2, 5), 1)),
    ("active_tokens", lambda: (int8(), int32(0), 2)),
    ("gather_rows", lambda: (torch.randn(6, 4, requires_grad=True), int64(1, 1, 5))),
    ("gather_rows", lambda: (torch.randn(4, 6).t(), int64())),
    ("scatter_rows", lambda: (torch.randn(6, 4, requires_grad=True), int64(5, 1), torch.randn(2, 4))),
    ("scatter_rows", lambda: (torch.randn(6, 4), int64(5, 1), torch.randn(4, 2).t().requires_grad_())),
]


@pytest.mark.parametrize(("op", "arguments"), OPCHECKED)
def test_opcheck(op, arguments):
    opcheck(getattr(torch.ops.drllm_fast, op).default, arguments())


def test_gradients(implementation):
    def draw(rows):
        return torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)

    for index in (int64(), int64(4), int64(3, 0, 2)):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(implementation.gather_rows, (draw(5), index))
            assert check(implementation.scatter_rows, (draw(5), index, draw(len(index))))
    assert torch.autograd.gradcheck(implementation.gather_rows, (draw(5), int64(1, 1, 4)))


def test_only_the_gradients_that_are_asked_for():
    y = torch.ones(1, 2, requires_grad=True)
    ops.scatter_rows(torch.zeros(3, 2), int64(1), y).sum().backward()
    assert y.grad.tolist() == [[1, 1]]
    x = torch.zeros(3, 2, requires_grad=True)
    ops.scatter_rows(x, int64(1), torch.ones(1, 2)).sum().backward()
    assert x.grad.tolist() == [[1, 1], [0, 0], [1, 1]]


def visit(x, decisions, cu_seqlens):
    index, cu_active = ops.active_tokens(decisions, cu_seqlens, at_least=1)
    return ops.scatter_rows(x, index, ops.gather_rows(x, index) * 2), cu_active


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_one_graph_for_all_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(visit, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, decisions in [([2, 3], [1, 0]), ([4, 0, 5], [0, 1, 2]), ([7, 1, 2, 3], [0, 0, 0, 0])]:
        ends = int32(*(sum(lengths[:i]) for i in range(len(lengths) + 1)))
        x = torch.randn(sum(lengths), 4, requires_grad=True)
        for got, expected in zip(compiled(x, int8(*decisions), ends), visit(x, int8(*decisions), ends), strict=True):
            assert torch.equal(got, expected)
        (got,) = torch.autograd.grad(compiled(x, int8(*decisions), ends)[0].square().sum(), x)
        (expected,) = torch.autograd.grad(visit(x, int8(*decisions), ends)[0].square().sum(), x)
        assert torch.equal(got, expected)


def test_compiled_kernels_are_in_front_of_the_reference():
    if ops.EXTENSION_ERROR is not None:
        pytest.skip(f"the extension is not loaded: {ops.EXTENSION_ERROR}")
    for op in ("active_tokens", "gather_rows", "scatter_rows"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"drllm_fast::{op}", "CPU")
