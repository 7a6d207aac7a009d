"""The row ops against an oracle in plain Python: through the dispatcher (C++ where it is compiled), and the reference
implementation on its own."""

import random

import pytest
import torch
from torch.library import opcheck

from drllm_fast import ops, rows_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex128]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# csrc/cpu/rows.cpp gives a thread 2 ** 17 bytes: this many float32 columns make that 4 rows
ROWS_PER_TASK, WIDE = 4, 2**13


class Reference:
    gather_rows, scatter_rows = rows_reference.gather_rows, rows_reference.scatter_rows
    scatter_add_rows = rows_reference.scatter_add_rows

    @staticmethod
    def active_tokens(decisions, cu_seqlens, *, at_least):
        return rows_reference.active_tokens(decisions, cu_seqlens, at_least)

    @staticmethod
    def visit_rows(decisions, cu_seqlens, *, tokens):
        return rows_reference.visit_rows(decisions, cu_seqlens, tokens)

    @staticmethod
    def gather_rms_norm(x, index, weight, *, eps):
        return rows_reference.gather_rms_norm(x, index, weight, eps)


@pytest.fixture(params=[ops, Reference], ids=["dispatched", "reference"])
def implementation(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


def oracle_visits(decisions, lengths, tokens):
    visits = []
    for at_least in (1, 2):
        index, ends = oracle_active(decisions, lengths, at_least)
        rows = [row for row, decision in enumerate(decisions) if decision >= at_least]
        visits.append(
            (
                index + [-1] * (tokens - len(index)),
                ends + ends[-1:] * (len(decisions) + 1 - len(ends)),
                rows + [-1] * (len(decisions) - len(rows)),
            )
        )
    return tuple([list(both) for both in zip(*visits, strict=True)])


@pytest.mark.parametrize("spare", [0, 1, 5])
@pytest.mark.parametrize(
    ("decisions", "lengths"),
    [
        ([], []),
        ([1], [0]),
        ([0], [3]),
        ([2], [1]),
        ([1, 2, 2], [2, 5, 1]),
        ([0, 0, 0], [2, 5, 1]),
        ([1, 0, 2, 1, 0, 2], [3, 2, 4, 1, 7, 1]),
        ([2, 1, 2, 2, 0, 1], [0, 0, 3, 0, 2, 0]),
        ([2, 2], [0, 0]),
        ([127, -128, 3], [1, 1, 1]),
        ([(7 * row) % 3 for row in range(40)], [(5 * row) % 7 for row in range(40)]),
    ],
)
def test_visit_rows(implementation, decisions, lengths, spare):
    ends, tokens = [sum(lengths[:i]) for i in range(len(lengths) + 1)], sum(lengths) + spare
    strided = int8(*decisions).repeat_interleave(2)[::2], int32(*ends).repeat_interleave(2)[::2]
    for given in ((int8(*decisions), int32(*ends)), strided):
        out = implementation.visit_rows(*given, tokens=tokens)
        assert [x.dtype for x in out] == [torch.int64, torch.int32, torch.int32]
        assert all(x.is_contiguous() for x in out)
        assert tuple(x.tolist() for x in out) == oracle_visits(decisions, lengths, tokens)


INDICES = {
    "none": [],
    "one": [3],
    "ends": [0, 8],
    "all": list(range(9)),
    "runs": [1, 2, 3, 6, 7],
    "backwards": list(range(9))[::-1],
    "mixed": [4, 5, 0, 8, 7, 1],
    "tail of none": [2, 3, 8, -1, -1, -1],
    "none between": [-1, 0, -1, -1, 1, 5, -1],
    "only none": [-1, -1],
}


def oracle_scatter(x, index, y):
    rows = x.tolist()
    for to, row in zip(index, y.tolist(), strict=True):
        if to >= 0:
            rows[to] = row
    return rows


def oracle_gather(x, index):
    """The rows, and zeros of the right type for none."""
    rows = x.tolist()
    return [rows[i] if i >= 0 else x.new_zeros(x.shape[1]).tolist() for i in index]


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
            assert out.tolist() == oracle_gather(rows, index), name
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


@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_is_not_read(implementation, rows):
    """Even what a zero does not cancel, and where there is no row at all."""
    x, none = torch.full((rows, 2), torch.nan), int64(-1, -1)
    assert implementation.gather_rows(x, none).tolist() == [[0, 0]] * 2
    for out in implementation.gather_rms_norm(x, none, torch.full([2], torch.nan), eps=1.0):
        assert out.tolist() == [[0, 0]] * 2
    for scatter in (implementation.scatter_rows, implementation.scatter_add_rows):
        out = scatter(torch.ones(rows, 2), none, torch.full((2, 2), torch.nan))
        assert out.tolist() == [[1, 1]] * rows


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


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("columns", [1, 5, 16, 35])
def test_scatter_add(implementation, index, dtype, columns):
    """One rounding, as in torch's own addition of two rows."""
    rows, new = torch.randn(9, columns).to(dtype), torch.randn(len(index), columns).to(dtype)
    expected = rows.clone()
    for i, row in enumerate(index):
        if row >= 0:
            expected[row] += new[i]
    for (name, x), (_, y) in zip(layouts(rows), layouts(new), strict=True):
        before = x.clone()
        for at in (int64(*index), int64(*index).repeat_interleave(2)[::2]):
            out = implementation.scatter_add_rows(x, at, y)
            assert torch.equal(out, expected) and out.dtype == dtype and out.is_contiguous(), name
            assert out.data_ptr() != x.data_ptr() and torch.equal(x, before), name


def llama_norm(x, weight, eps):
    """LlamaRMSNorm.forward of Hugging Face's transformers."""
    hidden = x.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return weight * hidden.to(x.dtype)


def exact_norm(x, weight, eps):
    x, weight = x.double(), weight.double()
    return weight * x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps)


def norm_bound(x, weight, eps):
    """The norm in float64, and what may be lost against it: twice what the eager norm loses, or twice the last bit."""
    exact = exact_norm(x, weight, eps)
    lost = (llama_norm(x, weight, eps) - exact).abs().max()
    return exact, 2 * float(torch.maximum(lost, torch.finfo(x.dtype).eps * exact.abs().max()))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 37, 576])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_gather_rms_norm(implementation, dtype, columns, size):
    eps, index = 1e-5, [4, 4, -1, 0, 8, -1]
    rows = (size * torch.randn(9, columns)).to(dtype)
    rows[0] = 0
    values = (1 + torch.randn(columns) / 4).to(dtype)
    real = [i for i, row in enumerate(index) if row >= 0]
    exact, bound = norm_bound(rows[[index[i] for i in real]], values, eps)
    if dtype == torch.float64:
        bound = 1e-13 * float(exact.abs().max())  # the eager norm is one in float32
    for name, x in layouts(rows):
        for weight in (values, values.repeat_interleave(2)[::2]):
            for at in (int64(*index), int64(*index).repeat_interleave(2)[::2]):
                gathered, normed = implementation.gather_rms_norm(x, at, weight, eps=eps)
                assert gathered.tolist() == oracle_gather(rows, index), name
                assert normed.dtype == dtype and normed.is_contiguous() and gathered.is_contiguous(), name
                assert (normed[real].double() - exact).abs().max() <= bound, name
                assert not normed[[i for i, row in enumerate(index) if row < 0]].any(), name


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_the_norm_is_rounded_before_the_weight(implementation, dtype):
    """A weight of 3 on a norm that is rounded first leaves a multiple of 3 of the last bit."""
    x = torch.randn(64, 96).to(dtype)
    _, normed = implementation.gather_rms_norm(x, torch.arange(64), torch.full([96], 3.0, dtype=dtype), eps=1e-6)
    _, unit = implementation.gather_rms_norm(x, torch.arange(64), torch.ones(96, dtype=dtype), eps=1e-6)
    assert torch.equal(normed, 3 * unit)


def test_eps_counts(implementation):
    _, normed = implementation.gather_rms_norm(torch.ones(1, 4), int64(0), torch.ones(4), eps=3.0)
    assert normed.tolist() == [[0.5] * 4]


@pytest.mark.parametrize(("rows", "columns", "count"), [(0, 5, 0), (0, 0, 0), (4, 0, 2), (4, 5, 0)])
def test_nothing_to_add_or_norm(implementation, rows, columns, count):
    x, index = torch.zeros(rows, columns), torch.arange(count)
    assert implementation.scatter_add_rows(x, index, torch.ones(count, columns)).shape == (rows, columns)
    for out in implementation.gather_rms_norm(x, index, torch.ones(columns), eps=1e-5):
        assert out.shape == (count, columns)


@pytest.mark.parametrize("rows", [n * ROWS_PER_TASK + e for n in (1, 2, 5) for e in (-1, 0, 1)])
def test_many_and_wide_rows_are_added_and_normed(implementation, two_threads, rows):
    x = torch.randn(rows, WIDE)
    index = [i for i in range(rows) if i % 5 != 2]
    expected = x.clone()
    expected[index] += x[: len(index)]
    assert torch.equal(implementation.scatter_add_rows(x, int64(*index), x[: len(index)]), expected)
    gathered, normed = implementation.gather_rms_norm(x, int64(*index), x[0], eps=1e-5)
    exact, bound = norm_bound(x[index], x[0], 1e-5)
    assert torch.equal(gathered, x[index]) and (normed - exact).abs().max() <= bound


def meta(x):
    return x.to("meta")


X, Y, W, INDEX = torch.zeros(4, 3), torch.ones(2, 3), torch.ones(3), int64(0, 2)
DECISIONS, ENDS = int8(1, 0), int32(0, 2, 4)
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
    ("active_tokens", (int8(0, 0), int32(0, 4, -(2**31))), ValueError, "must not fall"),  # by more than an int32
    ("gather_rows", (X, INDEX.int()), TypeError, "index must be int64, got torch.int32"),
    ("gather_rows", (X, int64(0, 4)), ValueError, "index"),
    ("gather_rows", (X, int64(0, -2)), ValueError, "index"),
    ("gather_rows", (X, int64(-1, 4)), ValueError, "index"),
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
    ("scatter_rows", (X, int64(-2, 0), Y), ValueError, "index"),
    ("scatter_rows", (X, int64(2, 2), Y), ValueError, "must not name a row twice"),
    ("scatter_rows", (X, int64(0, 0), Y), ValueError, "must not name a row twice"),
    ("scatter_add_rows", (X, INDEX.int(), Y), TypeError, "index must be int64"),
    ("scatter_add_rows", (X.long(), INDEX, Y.long()), TypeError, "x must be float32, bfloat16, float16, float64, got"),
    ("scatter_add_rows", (X, INDEX, Y.half()), TypeError, "y must have the dtype of x, got torch.float16"),
    ("scatter_add_rows", (X, INDEX, Y[:1]), ValueError, r"y must be \[2, 3\].*got \[1, 3\]"),
    ("scatter_add_rows", (X, INDEX, Y[:, :2]), ValueError, r"y must be \[2, 3\].*got \[2, 2\]"),
    ("scatter_add_rows", (X, INDEX, meta(Y)), ValueError, "x is on cpu, y on meta"),
    ("scatter_add_rows", (X, int64(0, 4), Y), ValueError, "index"),
    ("scatter_add_rows", (X, int64(0, -2), Y), ValueError, "index"),
    ("scatter_add_rows", (X, int64(2, 2), Y), ValueError, "must not name a row twice"),
    ("scatter_add_rows", (X, int64(0, 0), Y), ValueError, "must not name a row twice"),
    ("gather_rms_norm", (X, INDEX.int(), W), TypeError, "index must be int64"),
    ("gather_rms_norm", (X.cfloat(), INDEX, W.cfloat()), TypeError, "x must be float32, .*, got torch.complex64"),
    ("gather_rms_norm", (X, INDEX, W.half()), TypeError, "weight must have the dtype of x, got torch.float16"),
    ("gather_rms_norm", (X, INDEX, W[:2]), ValueError, r"weight must be \[3\].*got \[2\]"),
    ("gather_rms_norm", (X, INDEX, W[None]), ValueError, r"weight must be \[3\].*got \[1, 3\]"),
    ("gather_rms_norm", (X, INDEX, meta(W)), ValueError, "x is on cpu, weight on meta"),
    ("gather_rms_norm", (X[0], INDEX, W), ValueError, r"got \[3\] and \[2\]"),
    ("gather_rms_norm", (X, int64(0, 4), W), ValueError, "index"),
    ("gather_rms_norm", (X, int64(0, -2), W), ValueError, "index"),
    ("visit_rows", (DECISIONS.int(), ENDS), TypeError, "decisions must be int8, got torch.int32"),
    ("visit_rows", (DECISIONS, ENDS.long()), TypeError, "cu_seqlens must be int32, got torch.int64"),
    ("visit_rows", (DECISIONS, int32(0, 4)), ValueError, r"\[B \+ 1\], got \[2\] and \[2\]"),
    ("visit_rows", (meta(DECISIONS), ENDS), ValueError, "decisions is on meta, cu_seqlens on cpu"),
    ("visit_rows", (DECISIONS, int32(1, 2, 4)), ValueError, "cu_seqlens must start at 0"),
    ("visit_rows", (DECISIONS, int32(0, 4, 2)), ValueError, "must not fall"),
    ("visit_rows", (DECISIONS, int32(0, 2, 8)), ValueError, r"tokens must be at least cu_seqlens\[-1\], got 7 and 8"),
]
OPTIONS = {"active_tokens": {"at_least": 1}, "visit_rows": {"tokens": 7}, "gather_rms_norm": {"eps": 1e-5}}


@pytest.mark.parametrize(("op", "arguments", "error", "message"), REFUSED)
def test_refusals(implementation, op, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(implementation, op)(*arguments, **OPTIONS.get(op, {}))


@pytest.mark.parametrize("at_least", [-1, 128, 300])
def test_refused_threshold(implementation, at_least):
    with pytest.raises(ValueError, match=f"at_least must be from 0 to 127, got {at_least}"):
        implementation.active_tokens(DECISIONS, ENDS, at_least=at_least)


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan"), float("inf")])
def test_refused_eps(implementation, eps):
    with pytest.raises(ValueError, match="eps must be positive and finite, got"):
        implementation.gather_rms_norm(X, INDEX, W, eps=eps)


def test_refused_size(implementation):
    with pytest.raises(ValueError, match="tokens must be at least 0, got -1"):
        implementation.visit_rows(int8(), int32(0), tokens=-1)


@pytest.mark.parametrize(
    ("op", "arguments", "error"),
    [refused[:3] for refused in REFUSED if not any(x.is_meta for x in refused[1])],  # meta tensors would be faked
)
def test_refusals_below_the_public_functions(op, arguments, error):
    """A kernel checks for itself what it would otherwise read or write out of bounds."""
    with pytest.raises((error, RuntimeError)):
        getattr(torch.ops.drllm_fast, op)(*arguments, *OPTIONS.get(op, {}).values())


OPCHECKED = [
    ("active_tokens", lambda: (int8(1, 0, 2), int32(0, 2, 2, 5), 1)),
    ("active_tokens", lambda: (int8(), int32(0), 2)),
    ("gather_rows", lambda: (torch.randn(6, 4, requires_grad=True), int64(1, 1, 5))),
    ("gather_rows", lambda: (torch.randn(4, 6).t(), int64())),
    ("scatter_rows", lambda: (torch.randn(6, 4, requires_grad=True), int64(5, 1), torch.randn(2, 4))),
    ("scatter_rows", lambda: (torch.randn(6, 4), int64(5, 1), torch.randn(4, 2).t().requires_grad_())),
    ("scatter_rows", lambda: (torch.randn(6, 4, requires_grad=True), int64(5, -1, -1), torch.randn(3, 4))),
    ("scatter_add_rows", lambda: (torch.randn(6, 4, requires_grad=True), int64(5, -1), torch.randn(2, 4))),
    ("scatter_add_rows", lambda: (torch.randn(4, 6).t(), int64(), torch.randn(0, 4).requires_grad_())),
    ("gather_rms_norm", lambda: (torch.randn(6, 4, requires_grad=True), int64(1, -1, 5), torch.randn(4), 1e-5)),
    ("gather_rms_norm", lambda: (torch.randn(4, 6).t(), int64(1, 1), torch.randn(4, requires_grad=True), 1e-5)),
    ("visit_rows", lambda: (int8(1, 0, 2), int32(0, 2, 2, 5), 6)),
    ("visit_rows", lambda: (int8(), int32(0), 0)),
]


@pytest.mark.parametrize(("op", "arguments"), OPCHECKED)
def test_opcheck(op, arguments):
    opcheck(getattr(torch.ops.drllm_fast, op).default, arguments())


def test_gradients(implementation):
    def draw(rows):
        return torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)

    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    for index in (int64(), int64(4), int64(3, 0, 2), int64(3, -1, 0, -1), int64(-1)):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(implementation.gather_rows, (draw(5), index))
            assert check(implementation.scatter_rows, (draw(5), index, draw(len(index))))
            assert check(implementation.scatter_add_rows, (draw(5), index, draw(len(index))))
            assert check(lambda x, at, w: implementation.gather_rms_norm(x, at, w, eps=0.1), (draw(5), index, weight))
    assert torch.autograd.gradcheck(implementation.gather_rows, (draw(5), int64(1, 1, 4)))


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_gradients_of_the_norm_in_its_dtype(dtype):
    """Against float64, at most twice what autograd through the eager norm loses."""
    index, eps, size = int64(3, 0, 3, -1), 1e-5, 33
    x, weight = torch.randn(5, size).to(dtype), torch.randn(size).to(dtype)
    seeds = torch.randn(2, len(index), size).to(dtype)

    def gradients(function, to):
        leaves = x.to(to, copy=True).requires_grad_(), weight.to(to, copy=True).requires_grad_()
        grads = torch.autograd.grad(function(*leaves), leaves, tuple(seeds.to(to)))
        assert all(grad.dtype == to for grad in grads)
        return [grad.double() for grad in grads]

    def gathered_and(norm):
        def run(x, weight):
            gathered = torch.where(index[:, None] >= 0, x[index], 0)
            return gathered, norm(gathered, weight, eps)

        return run

    ours = gradients(lambda x, weight: ops.gather_rms_norm(x, index, weight, eps=eps), dtype)
    eager, exact = gradients(gathered_and(llama_norm), dtype), gradients(gathered_and(exact_norm), torch.float64)
    for ours_of, eager_of, exact_of in zip(ours, eager, exact, strict=True):
        assert (ours_of - exact_of).abs().max() <= 2 * (eager_of - exact_of).abs().max()


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


def both_visits(x, decisions, cu_seqlens, weight):
    index, _, _ = ops.visit_rows(decisions, cu_seqlens, tokens=x.shape[0])
    for at in index.unbind():
        gathered, normed = ops.gather_rms_norm(x, at, weight, eps=1e-5)
        x = ops.scatter_add_rows(x, at, normed * 2)
        x = ops.scatter_rows(x, at, ops.gather_rows(x, at) + gathered)
    return x


def test_one_graph_for_all_shapes_and_decisions():
    """Buffers of a fixed size: no shape of this graph depends on what a tensor holds."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both_visits, fullgraph=True, dynamic=True, backend=counter)
    weight = torch.randn(4, requires_grad=True)
    for lengths, decisions in [([2, 3], [1, 2]), ([4, 0, 5], [0, 1, 2]), ([7, 1, 2, 3], [0, 0, 0, 0])]:
        ends = int32(*(sum(lengths[:i]) for i in range(len(lengths) + 1)))
        x = torch.randn(sum(lengths), 4, requires_grad=True)
        got, expected = (f(x, int8(*decisions), ends, weight) for f in (compiled, both_visits))
        assert torch.equal(got, expected)
        index = oracle_visits(decisions, lengths, sum(lengths))[0]
        by_hand = x
        for at in ([i for i in visit if i >= 0] for visit in index):
            rows = by_hand[at]
            by_hand = by_hand.index_copy(0, int64(*at), rows + 2 * llama_norm(rows, weight, 1e-5) + rows)
        torch.testing.assert_close(got, by_hand)
        seed = torch.randn_like(x)
        grads = [torch.autograd.grad(out, (x, weight), seed) for out in (got, expected, by_hand)]
        for of_got, of_expected, of_hand in zip(*grads, strict=True):
            torch.testing.assert_close(of_got, of_expected)
            torch.testing.assert_close(of_got, of_hand, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_compiled_kernels_are_in_front_of_the_reference():
    if ops.EXTENSION_ERROR is not None:
        pytest.skip(f"the extension is not loaded: {ops.EXTENSION_ERROR}")
    for op in {op for op, _ in OPCHECKED}:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"drllm_fast::{op}", "CPU")
