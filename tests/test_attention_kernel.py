"""The Triton kernels of `ragged_attention` against loops over rows, heads and queries in fp64, under the interpreter
where there is no GPU; see `attention_cases` for the tolerances.

Memory that is not written holds NaN throughout, and so do the keys and values between the rows'.
"""

import json
import subprocess
import sys

import pytest
import torch
from attention_cases import eager, inputs, oracle, rounding_bound
from triton_offline import require_triton

require_triton()

import triton.language as tl  # noqa: E402

from drllm_fast import attention_kernel, attention_ops, attention_reference, ops, varlen  # noqa: E402
from drllm_fast.attention_kernel import BLOCK_SPLITS, MAX_DECODE, SPLIT, block_sizes, split_length  # noqa: E402  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
M, N, *_ = block_sizes(1000, 16, torch.float32, 9)
SIZES = [1, N - 1, N, N + 1, 2 * N + 5]  # of keys


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def bf16_as_on_a_device(monkeypatch):
    """Triton 3.9's interpreter keeps bf16 as uint16: tl.dot multiplies those, and .to(tl.bfloat16) cuts off bits."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, *rest):
        return dot(self, *(cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest)

    def cast_impl(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        return TensorHandle(torch.tensor(x.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


def attend(query, keys, values, new, starts, total, *, scale=None, at_most=None, **given):
    """The launcher, called like the oracle; at_most: the bounds it is given, by default the tightest."""
    layout = [torch.tensor(x, dtype=torch.int32) for x in ([0, *torch.tensor(new).cumsum(0).tolist()], starts, total)]
    query, keys, values = query[0].transpose(0, 1), keys[0], values[0]
    tensors = [t.to(DEVICE) for t in (query, keys, values, *layout)]
    if given.get("sinks") is not None:
        given["sinks"] = given["sinks"].to(DEVICE)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    out = attention_kernel.ragged_attention(*tensors, *(at_most or (max(new), max(total))), scale, **given)
    assert out.is_contiguous() and out.dtype == query.dtype
    return out.cpu().unsqueeze(0)


def check(new, total, heads, *, dim=8, dim_v=8, layout="heads first", gap=2, order=None, **given):
    query, keys, values, starts = inputs(new, total, heads, dim=dim, dim_v=dim_v, layout=layout, gap=gap)
    if order is not None:
        new, total, starts = ([x[i] for i in order] for x in (new, total, starts))
    if given.get("sinks"):
        given["sinks"] = torch.linspace(-1, 2, heads[0])
    qkv = (query, keys, values)
    out = attend(*qkv, new, starts, total, **given)
    assert out.shape == (1, sum(new), heads[0], dim_v)
    assert (out - oracle(*qkv, new, starts, total, **given)).abs().max() <= rounding_bound(*qkv, **given)
    return out


def spied(monkeypatch):
    """What the kernel is launched with: a list that grows."""
    launches, kernel = [], attention_kernel.ragged_attention_kernel

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append({"grid": grid, **options}) or kernel[grid](*args, **options)

    monkeypatch.setattr(attention_kernel, "ragged_attention_kernel", Spy())
    return launches


FEATURES = {
    "causal": {},
    "window 1": {"window": 1},
    "window 7": {"window": 7},
    "window N": {"window": N},
    "window N + 1": {"window": N + 1},
    "window 2N": {"window": 2 * N},
    "window 999": {"window": 999},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": True},
    "all": {"softcap": 1.5, "window": 11, "sinks": True, "scale": -0.5},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)], ids=str)
def test_rows_of_every_size(monkeypatch, heads, feature):
    """Tiles of M queries, of all heads of a group: rows that fill one, leave one free, spill over into the next."""
    launches, group = spied(monkeypatch), heads[0] // heads[1]
    new = sorted({max(1, n // group) for n in (1, M - 1, M, M + 1, 2 * M + 5)} | {3})
    total = [max(n, m) for n, m in zip(new, [2, *SIZES], strict=False)]
    last = 2 * M // group + 5
    check([*new, 0, last], [*total, 3, 2 * N + last], heads, **FEATURES[feature])
    assert launches[0]["SEARCH"] and not launches[0]["SPLIT"]


@pytest.mark.parametrize("feature", ["causal", "window 7", "window N + 1"])
@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize("new", [1, 2, N])
def test_one_row(monkeypatch, new, length, feature):
    launches = spied(monkeypatch)
    check([min(new, length)], [length], (2, 1), **FEATURES[feature])
    assert not launches[0]["SEARCH"]


@pytest.mark.parametrize("rows", [15, 16, 17, 37])
def test_the_search_for_a_row(monkeypatch, rows):
    """Rows without queries at both ends and in between; the long one comes last or first."""
    monkeypatch.setattr(attention_kernel, "BLOCK_ROWS", 16)
    launches = spied(monkeypatch)
    new = [0, 0, *[1, 0] * (rows // 2 - 2), *[2] * (rows % 2), 2 * M + 1, 0]
    for order in (range(rows), range(rows)[::-1]):
        check(new, [n + 1 for n in new], (2, 1), order=order)
    assert len(new) == rows and all(launch["SEARCH"] for launch in launches)


DECODES = {
    "one row": ([1], [2 * SPLIT + 5]),
    "split lengths": ([1] * 5, [1, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 5]),
    "several tokens": ([2, 0, MAX_DECODE, 1], [SPLIT + 1, 4, 2 * SPLIT + 5, SPLIT]),
    "few programs": ([MAX_DECODE + 1, 3], [SPLIT + 3, 3]),
}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"window": 5},
        {"window": SPLIT - 1},
        {"window": SPLIT + 1},
        {"sinks": True},
        {"window": SPLIT, "sinks": True, "softcap": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [(6, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("rows", DECODES)
def test_split_keys(monkeypatch, rows, heads, given):
    launches = spied(monkeypatch)
    check(*DECODES[rows], heads, **given)
    assert launches[0]["SPLIT"] == SPLIT and launches[0]["grid"][2] > 1


@pytest.mark.parametrize("splits", [BLOCK_SPLITS - 1, BLOCK_SPLITS, BLOCK_SPLITS + 1, 2 * BLOCK_SPLITS + 5])
def test_more_splits_than_are_combined_at_once(monkeypatch, splits):
    monkeypatch.setattr(attention_kernel, "SPLIT", N)
    launches = spied(monkeypatch)
    check([1, 2, 1], [splits * N - 3, 2, N + 1], (2, 1), sinks=True)
    assert launches[0]["grid"][2] == splits


def test_many_programs_take_longer_splits(monkeypatch):
    monkeypatch.setattr(attention_kernel, "MAX_PROGRAMS", 8)
    launches = spied(monkeypatch)
    check([1, 1], [4 * SPLIT + 5, 3], (2, 2))
    assert launches[0]["SPLIT"] == 4 * SPLIT and launches[0]["grid"] == (2, 2, 2)


def test_many_programs_need_no_splits(monkeypatch):
    monkeypatch.setattr(attention_kernel, "FEW_PROGRAMS", 4)
    launches = spied(monkeypatch)
    check([MAX_DECODE + 1] * 2, [SPLIT + N + 3, SPLIT + MAX_DECODE], (2, 1), window=SPLIT)
    check([MAX_DECODE + 1] * 2, [SPLIT + N + 3, SPLIT + MAX_DECODE], (2, 1), sinks=True)
    assert not any(launch["SPLIT"] for launch in launches)


@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 8, 9])
def test_splits_cover_what_is_in_sight(monkeypatch, window):
    monkeypatch.setattr(attention_kernel, "SPLIT", 4)
    for max_query in (1, 2, 5):
        for max_length in range(max_query, 30):
            length, splits = split_length(1, max_query, max_length, window)
            assert length or splits == 1
            for n in range(1, max_query + 1):
                for m in range(n, max_length + 1):
                    oldest = 0 if window is None else max(0, m - n - window + 1)
                    assert length == 0 or (m - 1) // length - oldest // length < splits


@pytest.mark.parametrize(("new", "total"), [([N, 3], [N + 5, 9]), ([1, 2], [SPLIT + 9, 40])], ids=["tiles", "splits"])
@pytest.mark.parametrize("layout", ["tokens first", "slices"])
def test_layouts(new, total, layout):
    gap = 0 if layout == "tokens first" else 3
    check(new, total, (6, 2), layout=layout, gap=gap, window=N)


@pytest.mark.parametrize(("dim", "dim_v"), [(16, 16), (24, 24), (80, 80), (8, 40), (40, 8), (160, 160)])
@pytest.mark.parametrize(("new", "total"), [([7, 3], [N + 5, 9]), ([1, 1], [SPLIT + 9, 40])], ids=["tiles", "splits"])
def test_head_dims(new, total, dim, dim_v):
    check(new, total, (3, 1), dim=dim, dim_v=dim_v, sinks=True)


@pytest.mark.parametrize("feature", ["causal", "window 7", "sinks"])
@pytest.mark.parametrize("at_most", [(M + 7, N + 9), (9 * M, 3 * SPLIT), (3, 9 * SPLIT), (9 * M, N + 9)], ids=str)
def test_bounds_may_be_generous(at_most, feature):
    """As for a graph that is captured once and replayed as rows grow."""
    new, total, heads = [3, 1, 0, 2], [9, N + 9, 4, 2], (4, 2)
    query, keys, values, starts = inputs(new, total, heads)
    given = dict(FEATURES[feature])
    if given.get("sinks"):
        given["sinks"] = torch.linspace(-1, 2, heads[0])
    out = attend(query, keys, values, new, starts, total, at_most=at_most, **given)
    expected = oracle(query, keys, values, new, starts, total, **given)
    assert (out - expected).abs().max() <= rounding_bound(query, keys, values, **given)


def test_segments_may_lie_in_any_order():
    check([2, 1, 3], [5, 9, 3], (6, 2), order=[2, 0, 1])
    check([1, 1, 1], [SPLIT + 1, 9, 2 * SPLIT + 5], (6, 2), order=[2, 0, 1])


@pytest.mark.parametrize(("new", "total"), [([], []), ([0, 0], [0, 3])], ids=["no row", "no query"])
def test_nothing_to_do(new, total):
    query, keys, values, starts = inputs(new, total, (4, 2))
    layout = [torch.tensor(x, dtype=torch.int32) for x in ([0] * (len(new) + 1), starts, total)]
    out = attention_kernel.ragged_attention(query[0].transpose(0, 1), keys[0], values[0], *layout, 0, 3, 1.0)
    assert out.shape == (0, 4, 8)


@pytest.mark.parametrize("feature", ["causal", "window 7", "softcap", "sinks", "all"])
@pytest.mark.parametrize("rows", ["tiles", "splits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_as_exact_as_eager(dtype, rows, feature):
    """Tiles are of 128 queries and 64 keys here: rows of 127 to 261."""
    heads = (2, 1)
    new, total = ([63, 64, 131], [65, 64, 193]) if rows == "tiles" else ([1, 2, 1], [SPLIT + 40, 2 * SPLIT + 5, 70])
    query, keys, values, starts = inputs(new, total, heads, dtype=dtype, dim=16, dim_v=16)
    given = dict(FEATURES[feature])
    if given.get("sinks"):
        given["sinks"] = torch.linspace(-1, 2, heads[0]).to(dtype)
    arguments = (query, keys, values, new, starts, total)
    expected = oracle(*arguments, **given)
    ours, theirs = ((f(*arguments, **given) - expected).abs().max() for f in (attend, eager))
    assert ours <= 2 * theirs


def test_a_row_that_decodes_does_not_depend_on_its_batch():
    new, total, heads = [1, 1, 1], [SPLIT + 9, 3, 2 * SPLIT + 5], (6, 2)
    query, keys, values, starts = inputs(new, total, heads)
    for given in ({}, {"sinks": torch.linspace(-1, 2, heads[0])}):
        together = attend(query, keys, values, new, starts, total, **given)
        assert torch.equal(together, attend(query, keys, values, new, starts, total, **given))
        for i in range(3):
            alone = attend(query[:, :, i : i + 1], keys, values, [1], starts[i : i + 1], total[i : i + 1], **given)
            assert torch.equal(alone, together[:, i : i + 1])


def test_what_runs_on_cuda(monkeypatch):
    """float64 by the reference, packed rows by varlen_attn where it offers that, all others by Triton."""
    ran = []
    monkeypatch.setattr(attention_reference, "ragged_attention", lambda *args: ran.append(("reference", args)))
    monkeypatch.setattr(attention_kernel, "ragged_attention", lambda *args: ran.append(("kernel", args)))
    monkeypatch.setattr(varlen, "packed_attention", lambda *args: ran.append(("varlen", args)))
    takes = []
    monkeypatch.setattr(varlen, "offers", lambda *args: takes.append(args) or args[3] == 2)
    query, keys, values = torch.zeros(3, 2, 8), torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)
    cu_seqlens, starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3], [0], [3]))
    layout = (cu_seqlens, starts, lengths)

    def run(query, *rest, packed):
        attention_ops.ragged_attention_cuda(query, *(t.to(query.dtype) for t in (keys, values)), *layout, *rest, packed)
        return ran.pop()

    rest = (2, 3, 0.5, 4, 0.25, None)
    assert run(query, *rest, packed=False) == ("kernel", (query, keys, values, *layout, *rest)) and not takes
    assert run(query, *rest, packed=True) == ("varlen", (query, keys, values, cu_seqlens, 2, 0.5, 4))
    assert takes == [(query, keys, values, 2, 0.5, 4, 0.25, None)]
    assert run(query, 1, *rest[1:], packed=True)[0] == "kernel"
    for packed in (False, True):
        assert run(query.double(), *rest, packed=packed)[0] == "reference"


def test_registration():
    """In a process of its own, with a torch that says it is built for CUDA; kernels are imported when called."""
    here = torch._C._dispatch_has_kernel_for_dispatch_key("drllm_fast::ragged_attention", "CUDA")
    assert here == (torch.version.cuda is not None)
    script = """
import json, sys, torch
torch.version.cuda = "13.0"
from drllm_fast.build_info import build_info
assert not {"drllm_fast.attention_kernel", "drllm_fast.varlen"} & sys.modules.keys()
print(json.dumps(build_info()["ops"]["ragged_attention"]))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout.splitlines()[-1])["cuda"]["implementation"] == "Triton"


def test_packed_is_a_promise():
    query, keys, values, _ = inputs([2, 3], [2, 3], (4, 2), gap=0)
    query, keys, values = query[0].transpose(0, 1), keys[0, :, 1:], values[0, :, 1:]
    ends, starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 2], [2, 3]))
    given = {"max_query": 3, "max_length": 3}
    out = ops.ragged_attention(query, keys, values, ends, starts, lengths, packed=True, **given)
    assert torch.equal(out, ops.ragged_attention(query, keys, values, ends, starts, lengths, **given))
    for wrong in ({"starts": torch.tensor([0, 1]).int()}, {"lengths": torch.tensor([3, 3]).int()}):
        layout = {"starts": starts, "lengths": lengths, **wrong}
        with pytest.raises(ValueError, match="packed=True"):
            ops.ragged_attention(query, keys, values, ends, packed=True, **layout, **given)


@pytest.mark.parametrize("packed", [(), (True,)], ids=["without packed", "packed"])
def test_opcheck(packed):
    query, keys, values, _ = inputs([2, 3], [2, 3], (4, 2), gap=0)
    layout = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 2], [2, 3]))
    tensors = (query[0].transpose(0, 1), keys[0, :, 1:], values[0, :, 1:], *layout)
    arguments = (*tensors, 3, 3, 0.5, None, None, None, *packed)
    torch.library.opcheck(torch.ops.drllm_fast.ragged_attention.default, arguments)
