"""The fused router against an oracle in fp64, window by window; under Triton's interpreter where there is no GPU.

The tolerance is a first-order bound on the rounding of the sums as they are taken, so it needs no tuning: see `oracle`.
Most tests shrink the kernel's blocks, so that small shapes reach past them; what is measured in blocks follows.
"""

import itertools
import random

import pytest
import torch
from triton_offline import require_triton

from drllm_fast import router_ops, router_reference

require_triton()

from triton.runtime import interpreter  # noqa: E402

from drllm_fast import router_kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = {"TOKENS": 4, "TILE": 16, "SCAN": 8, "BLOCK_D": 16, "MAX_BLOCK_H": 16}
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter's programs can be put in order")


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty is full of NaN, and of 127 in int8."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch):
    for name, size in BLOCKS.items():
        monkeypatch.setattr(router_kernel, name, size)


def around(block):
    return [1, block - 1, block, block + 1, 2 * block + 5]


def inputs(lengths, d=5, h=6, windows=3, *, dtype=torch.float32, weights=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), d), (h, d), (h,), (3, h), (3,), (3,)]
    x, w1, b1, w2, b2, cost = (torch.randn(*shape, generator=g) for shape in shapes)
    x, *rest = x.to(dtype), *(t.to(weights or torch.float32) for t in (w1 / d**0.5, b1, w2 / h**0.5, b2, cost))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return [*(t.to(DEVICE) for t in (x, cu_seqlens, *rest)), windows]


def oracle(x, cu_seqlens, w1, b1, w2, b2, cost, windows):
    """Logits and the bound on their error, fp64 [B, 3].

    A sum of n terms in fp32, in any order, is off by n u sum |term|, u = 2 ** -24. A product in three TF32 parts is
    off by 2 ** -21. GELU's slope is below 1.13, and its own evaluation is off by some u, 16 here, of its argument.
    """
    u = 2.0**-24
    ends = cu_seqlens.tolist()
    x, w1, b1, w2, b2, cost = (t.detach().cpu().double() for t in (x, w1, b1, w2, b2, cost))
    logits, bounds = [], []
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        used = min(windows, end - start)
        if not used:
            logits.append(-cost)
            bounds.append(torch.zeros(3, dtype=torch.float64))
            continue
        size = (end - start) // used
        hidden, error = torch.zeros(len(b1)).double(), torch.zeros(len(b1)).double()
        for w in range(used):
            tokens = x[start + w * size : start + (w + 1) * size]
            z = w1 @ (tokens.sum(0) / size) + b1
            magnitude = w1.abs() @ (tokens.abs().sum(0) / size) + b1.abs()
            off = ((size + w1.shape[1] + 8) * u + 2.0**-21) * magnitude
            hidden += 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))) / used
            error += (1.13 * off + 16 * u * z.abs()) / used
        logits.append(w2 @ hidden + b2 - cost)
        terms = w2.abs() @ hidden.abs() + b2.abs() + cost.abs()
        bounds.append(w2.abs() @ error + (len(b1) + used + 8) * u * terms)
    empty = torch.zeros(0, 3, dtype=torch.float64)
    return (torch.stack(logits), torch.stack(bounds)) if logits else (empty, empty)


def check(arguments):
    logits, decisions = router_kernel.router(*arguments)
    assert logits.dtype == torch.float32 and decisions.dtype == torch.int8 and logits.device.type == DEVICE
    expected, bound = oracle(*arguments)
    assert logits.shape == expected.shape and decisions.shape == expected.shape[:1]
    error = (logits.cpu().double() - expected).abs()
    assert (error <= bound).all(), f"off by {error.max():.1e}, allowed {bound.max():.1e}"  # False for NaN, too
    # The oracle's class, unless two are too close to call.
    top = expected.topk(2, dim=1)
    clear = top.values[:, 0] - top.values[:, 1] > 2 * bound.amax(1)
    assert torch.equal(decisions.cpu()[clear].long(), top.indices[clear, 0])
    return logits, decisions


@pytest.mark.parametrize("size", around(BLOCKS["TOKENS"]))
@pytest.mark.parametrize("windows", [1, 3, 32])
def test_tokens_of_a_window(small_blocks, size, windows):
    check(inputs([windows * size + windows - 1, windows * size, 2], windows=windows))


@pytest.mark.parametrize("segments", around(BLOCKS["TILE"]))
def test_segments(small_blocks, segments):
    """In one window, in many windows of one row, and in many rows."""
    check(inputs([segments * BLOCKS["TOKENS"]], windows=1))
    check(inputs([segments, 3], windows=segments))
    check(inputs([1] * segments, windows=2))


@pytest.mark.parametrize("rows", around(BLOCKS["SCAN"]))
def test_rows(small_blocks, rows):
    draw = random.Random(rows)
    check(inputs(draw.choices([0, 1, 2, 7, 30], k=rows)))


@pytest.mark.parametrize("d", around(BLOCKS["BLOCK_D"]))
def test_columns(small_blocks, d):
    check(inputs([7, 0, 40], d=d))


@pytest.mark.parametrize("h", around(BLOCKS["MAX_BLOCK_H"]))
def test_hidden_units(small_blocks, h):
    check(inputs([7, 0, 40], h=h))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [0, 3, 0, 0, 9, 0], [0] * 20, [0] * 17 + [5]])
def test_rows_without_tokens(small_blocks, lengths):
    logits, _ = check(inputs(lengths))
    assert logits.shape == (len(lengths), 3)


@pytest.mark.parametrize("dtype", router_kernel.DTYPES)
@pytest.mark.parametrize("weights", router_kernel.DTYPES)
def test_dtypes(small_blocks, dtype, weights):
    check(inputs([7, 40], d=20, dtype=dtype, weights=weights))


@pytest.mark.parametrize(("d", "h"), [(70, 20), (33, 129)])
def test_blocks_as_they_are(d, h):
    check(inputs([1100, 0, 5, 260], d=d, h=h, windows=8, dtype=torch.bfloat16))


def test_layouts(small_blocks):
    x, cu_seqlens, w1, b1, w2, b2, cost, windows = inputs([7, 40], d=20)
    expected = router_kernel.router(x, cu_seqlens, w1, b1, w2, b2, cost, windows)
    for other in (torch.cat([x, x.flip(0)], 1)[:, :20], x.T.contiguous().T, x.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(other, x) and not other.is_contiguous()
        assert torch.equal(router_kernel.router(other, cu_seqlens, w1, b1, w2, b2, cost, windows)[0], expected[0])
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in (cu_seqlens, w1, b1, w2, b2, cost)]
    assert torch.equal(router_kernel.router(x, *spread, windows)[0], expected[0])


@interpreted
@pytest.mark.parametrize("order", ["backwards", "splits first", 0, 1])
def test_which_program_comes_last_changes_no_bit(small_blocks, monkeypatch, order):
    """Two tiles and more for a row, several rows in a tile, splits and chunks; and each row is finished once."""
    arguments = inputs([130, 5, 0, 40, 2, 2], d=34, h=20, windows=2)
    expected = router_kernel.router(*arguments)
    builder, places = interpreter.interpreter_builder, []

    def set_grid_idx(x, y, z):
        if not places:
            grid = list(itertools.product(*(range(n) for n in builder.grid_dim)))
            assert builder.grid_dim[0] >= 8 and builder.grid_dim[1] >= 3
            match order:
                case "backwards":
                    grid.reverse()
                case "splits first":
                    grid.sort(key=lambda at: (at[1], at[0]))
                case seed:
                    random.Random(seed).shuffle(grid)
            places.extend(grid)
        builder.grid_idx = places.pop()

    finish, finished = router_kernel._finish_row, []

    def finish_row(row, *rest):
        finished.append(row.handle.data.item())
        finish(row, *rest)

    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
    monkeypatch.setattr(router_kernel, "_finish_row", finish_row)
    logits, decisions = router_kernel.router(*arguments)
    assert not places and sorted(finished) == list(range(6))
    assert torch.equal(logits, expected[0]) and torch.equal(decisions, expected[1])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's inf * 0
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_do_not_see_each_other(small_blocks, bad):
    """All of them in one tile, with one window of several segments."""
    arguments = inputs([3, 9, 15, 2])
    expected, decided = router_kernel.router(*arguments)
    arguments[0][12:14] = bad
    logits, decisions = router_kernel.router(*arguments)
    others = torch.tensor([0, 1, 3], device=DEVICE)
    assert torch.equal(logits[others], expected[others]) and torch.equal(decisions[others], decided[others])
    assert not logits[2].isfinite().all() and decisions[2] == router_reference.decide(logits[2])


@pytest.mark.parametrize("values", list(itertools.product([0.0, 1.0, float("nan")], repeat=3)))
def test_ties_and_nan_execute(small_blocks, values):
    arguments = inputs([4], d=1, h=1, windows=1)
    arguments[4] = torch.zeros_like(arguments[4])
    arguments[5], arguments[6] = torch.tensor(values, device=DEVICE), torch.zeros(3, device=DEVICE)
    _, decisions = router_kernel.router(*arguments)
    assert decisions.tolist() == [{(1.0, 0.0, 0.0): 0, (0.0, 0.0, 1.0): 2}.get(values, 1)]


def test_what_the_kernel_does_not_take_is_the_references(monkeypatch):
    ran = []
    monkeypatch.setattr(router_kernel, "router", lambda *arguments: ran.append(arguments))
    router_ops._router_cuda(*inputs([3]))
    assert len(ran) == 1
    for arguments in (
        inputs([3], dtype=torch.float64),
        inputs([3], weights=torch.float64),
        inputs([3], h=router_kernel.MAX_H + 1),
    ):
        logits, _ = router_ops._router_cuda(*arguments)
        assert torch.equal(logits, router_reference.router(*arguments)[0])
    assert len(ran) == 1
    assert router_kernel.supports(*inputs([3], h=router_kernel.MAX_H)[:1], *inputs([3], h=router_kernel.MAX_H)[2:7])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_a_captured_graph_follows_its_inputs():
    arguments = inputs([300, 5, 0, 90], d=70, h=40, windows=4)
    other = inputs([10, 295, 90, 0], d=70, h=40, windows=4, seed=1)
    router_kernel.router(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, decisions = router_kernel.router(*arguments)
    for _ in range(2):
        graph.replay()
        assert torch.equal(logits, router_kernel.router(*arguments)[0])
        for tensor, new in zip(arguments[:-1], other[:-1], strict=True):
            tensor.copy_(new)
