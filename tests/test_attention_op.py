"""The op `ragged_attention` as the dispatcher runs it: C++ on the CPU where it is compiled.

Against the loops of attention_cases.py where shapes are small, and against dense fp64 where they come from what
csrc/cpu/attention_prefill.h and attention_decode.h count in: 4, 8 or 16 lanes, products of 6 rows, blocks of 64 keys,
tasks of 192 queries x heads, parts of 512 keys of a query that is alone in its row.
"""

from itertools import accumulate

import pytest
import torch
from attention_cases import DIM_V, FEATURES, HEADS, ROWS, eager, features, inputs, oracle, rounding_bound
from torch.library import opcheck

from drllm_fast import attention_reference, ops

U = 2.0**-24


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def attention(query, keys, values, new, starts, total, **options):
    """The op, in the shapes of attention_cases.py: query [1, H, T, D], keys [1, H_kv, N, D] -> [1, T, H, D_v]."""
    layout = int32([0, *accumulate(new)]), int32(starts), int32(total)
    longest = {"max_query": max(new, default=0), "max_length": max(total, default=0)}
    return ops.ragged_attention(query[0].transpose(0, 1), keys[0], values[0], *layout, **longest, **options)[None]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("rows", ROWS)
def test_equals_the_loops_in_fp64(rows, feature, heads):
    (new, total), heads = ROWS[rows], HEADS[heads]
    *qkv, starts = inputs(new, total, heads)
    given = features(feature, heads)
    out = attention(*qkv, new, starts, total, **given)
    assert out.shape == (1, sum(new), heads[0], DIM_V) and out.dtype == torch.float32 and out.is_contiguous()
    expected = oracle(*qkv, new, starts, total, **given)
    assert (out - expected).abs().max() <= rounding_bound(*qkv, **given)


@pytest.mark.parametrize("layout", ["tokens first", "slices"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_memory_layouts(rows, layout, dtype):
    (new, total), heads = ROWS[rows], HEADS["grouped"]
    gap = 0 if layout == "tokens first" else 3
    *qkv, starts = inputs(new, total, heads, layout=layout, gap=gap, dtype=dtype)
    dense = [t.contiguous() for t in qkv]
    assert torch.equal(attention(*qkv, new, starts, total), attention(*dense, new, starts, total))


def dense_oracle(query, keys, values, new, starts, total, *, scale=None, window=None, softcap=None, sinks=None):
    """fp64: the result [T, H, D_v], and the largest magnitudes of a score and of a value."""
    out, top, at, groups = [], 0.0, 0, query.shape[1] // keys.shape[0]
    scale = query.shape[2] ** -0.5 if scale is None else scale
    for n, start, m in zip(new, starts, total, strict=True):
        q = query[at : at + n].double().transpose(0, 1)  # [H, n, D]
        k, v = (t[:, start : start + m].double().repeat_interleave(groups, 0) for t in (keys, values))
        scores = q @ k.transpose(1, 2) * scale
        top = max(top, float((q.abs() @ k.abs().transpose(1, 2)).max()) * abs(scale) if scores.numel() else 0)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position, key = torch.arange(m - n, m)[:, None], torch.arange(m)
        scores = scores.masked_fill((key > position) | (key <= position - (window or m)), -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, n, 1)], 2)
        out.append((scores.softmax(2)[..., :m] @ v).transpose(0, 1))
        at += n
    return torch.cat(out), top


def slot(new, total, heads, kv_heads, dim, dim_v, dtype, seed=0):
    """Rows that lie apart, NaN in between."""
    g = torch.Generator().manual_seed(seed)
    starts = [0, *accumulate(m + 3 for m in total)]
    query = torch.randn(sum(new), heads, dim, generator=g).to(dtype)
    keys, values = (torch.full((kv_heads, starts[-1], d), torch.nan, dtype=dtype) for d in (dim, dim_v))
    for start, m in zip(starts, total, strict=False):
        for t in (keys, values):
            t[:, start : start + m] = torch.randn(kv_heads, m, t.shape[2], generator=g).to(dtype)
    return query, keys, values, new, starts[:-1], total


def check(case, **options):
    query, keys, values, new, starts, total = case
    layout = int32([0, *accumulate(new)]), int32(starts), int32(total)
    longest = {"max_query": max(new), "max_length": max(total)}
    out = ops.ragged_attention(query, keys, values, *layout, **longest, **options)
    expected, top = dense_oracle(*case, **options)
    lost = (out - expected).abs().max()
    if query.dtype == torch.float32:
        # As in attention_cases.rounding_bound, with the magnitudes of these inputs.
        score = (query.shape[2] + 2) * U * top + 6 * U * (options.get("softcap") or 0)
        bound = 2 * (2 * score + (2 * max(total) + 6) * U) * float(values[~values.isnan()].abs().max())
    else:
        four = (t[None] for t in (query.transpose(0, 1), keys, values))
        bound = 2 * (eager(*four, new, starts, total, **options)[0] - expected).abs().max()
    assert lost <= bound


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("dim", [1, 3, 4, 8, 15, 16, 17, 24, 32, 37, 64, 80, 96, 128, 256])
def test_any_width(dim, dtype):
    for dim_v in {dim, 16, 37}:
        check(slot([1, 5, 70], [70, 5, 70], 6, 2, dim, dim_v, dtype))


@DTYPES
@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 133, 511, 512, 513, 1029])
def test_any_length_of_a_decode(length, dtype):
    check(slot([1], [length], 6, 2, 32, 32, dtype))
    check(slot([1, 1, 1], [length, 1, 70], 6, 2, 32, 32, dtype), window=length // 2 + 1, softcap=3.0)


@DTYPES
@pytest.mark.parametrize("new", [1, 2, 5, 6, 7, 17, 31, 32, 33, 63, 64, 65, 133])
def test_any_number_of_queries(new, dtype):
    check(slot([new], [new], 6, 1, 16, 16, dtype))  # 6 heads of a group: tasks of 32 tokens
    check(slot([new, 2], [new + 70, 9], 6, 3, 16, 16, dtype), window=40)


@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (8, 1), (9, 3), (14, 2), (71, 1)]
)
def test_any_group(heads, kv_heads, dtype):
    sinks = torch.linspace(-2, 3, heads).to(dtype)
    check(slot([1, 4, 1], [600, 9, 3], heads, kv_heads, 32, 32, dtype), sinks=sinks)


@DTYPES
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 300, 1000])
def test_windows_over_blocks(window, dtype):
    check(slot([1, 300, 7], [900, 300, 200], 4, 2, 16, 16, dtype), window=window)


@DTYPES
def test_large_scores(dtype):
    """Scores of hundreds: one key takes all, and the running maximum moves from block to block."""
    query, keys, values, *rest = slot([1, 200], [900, 200], 4, 2, 16, 16, dtype)
    check((query * 20, keys * 20, values, *rest), scale=1.0)
    check((query * 20, keys * 20, values, *rest), scale=-1.0)
    check((query * 0, keys, values, *rest))
    rising = torch.linspace(-40, 40, keys.shape[1]).view(1, -1, 1).to(dtype)
    check((query.abs(), (keys * 0 + rising).clone(), values, *rest))


@DTYPES
@pytest.mark.parametrize(("new", "total"), [(1, 30), (1, 700), (70, 100), (5, 90)])
@pytest.mark.parametrize("dim", [24, 32])
def test_a_nan_shows(new, total, dim, dtype):
    """Where it is asked with, or seen; and nowhere else."""
    query, keys, values, *layout = slot([new], [total], 2, 1, dim, 32, dtype)
    hit, past = new // 2, total - new
    for softcap in (None, 2.0):

        def attend(query, keys):
            return attention(*(t[None] for t in (query.transpose(0, 1), keys, values)), *layout, softcap=softcap)[0]  # noqa: B023

        clean = attend(query, keys)
        asked, seen = query.clone(), keys.clone()
        asked[hit, 0, 3] = seen[0, past + hit, dim - 1] = torch.nan
        out = attend(asked, keys)
        assert out[hit, 0].isnan().all() and int(out.isnan().sum()) == 32
        out = attend(query, seen)
        assert out[hit:].isnan().all() and torch.equal(out[:hit], clean[:hit])


@DTYPES
def test_hidden_keys_have_no_weight(dtype):
    """Not even the smallest there is, which these values would show."""
    query, keys, values, *layout = slot([9], [12], 2, 1, 16, 16, dtype)
    out = []
    for value in (0, 3e38):
        values[:, 11] = value
        out.append(attention(*(t[None] for t in (query.transpose(0, 1), keys, values)), *layout)[0, :8])
    assert torch.equal(*out)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("low", [70, 1100])
def test_scores_of_minus_infinity_have_no_weight(new, low):
    """Not even where all of a block, or of a part, are."""
    query, keys, values, *layout = slot([new], [1200], 2, 1, 16, 16, torch.float32)
    query.fill_(1e30)
    keys[:, :low], keys[:, low:] = -1e30, 0
    out = attention(*(t[None] for t in (query.transpose(0, 1), keys, values)), *layout)[0]
    for i in range(new):
        torch.testing.assert_close(out[i, 0], values[0, low : 1200 - new + i + 1].mean(0), atol=1e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_its_batch_or_on_threads():
    new, total = [1, 1, 40, 3, 1, 200], [900, 3, 40, 700, 64, 230]
    query, keys, values, _, starts, _ = slot(new, total, 6, 2, 32, 32, torch.float32)
    ends, before, results = [0, *accumulate(new)], torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(attention(*(t[None] for t in (query.transpose(0, 1), keys, values)), new, starts, total)[0])
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    if ops.EXTENSION_ERROR is None:
        for row, (n, start, m) in enumerate(zip(new, starts, total, strict=True)):
            own = query[ends[row] : ends[row + 1]].transpose(0, 1)
            alone = attention(*(t[None] for t in (own, keys, values)), [n], [start], [m])[0]
            assert torch.equal(alone, results[0][ends[row] : ends[row + 1]])


@pytest.mark.parametrize(
    ("new", "total"), [([], []), ([0], [0]), ([0, 0], [5, 0])], ids=["no rows", "an empty row", "idle rows"]
)
def test_nothing_to_do(new, total):
    *qkv, starts = inputs(new, total, HEADS["grouped"])
    assert attention(*qkv, new, starts, total).shape == (1, 0, 6, DIM_V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_heads_and_no_width(dtype):
    case = slot([1, 5], [7, 5], 4, 2, 0, 16, dtype)
    out = attention(*(t[None] for t in (case[0].transpose(0, 1), *case[1:3])), *case[3:])[0]
    torch.testing.assert_close(out[0, 0], case[2][0, :7].mean(0))  # all scores are 0
    no_heads = case[0].new_zeros(1, 0, 6, 0), *(t[None] for t in case[1:3])
    assert attention(*no_heads, *case[3:]).shape == (1, 6, 0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_options_at_the_ends_of_their_range(dtype):
    case = slot([1, 70], [9, 70], 2, 1, 16, 16, dtype)
    four = *(t[None] for t in (case[0].transpose(0, 1), *case[1:3])), *case[3:]
    assert torch.equal(attention(*four, window=2**63 - 1), attention(*four))
    flat = attention(*four, softcap=1e-300)[0]  # no score is left
    torch.testing.assert_close(flat[0, 0], case[2][0, :9].mean(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_types_without_a_kernel_run_the_reference(dtype):
    (new, total), heads = ROWS["turn"], HEADS["grouped"]
    *qkv, starts = inputs(new, total, heads, dtype=dtype)
    out = attention(*qkv, new, starts, total)
    assert out.dtype == dtype
    assert (out - oracle(*qkv, new, starts, total)).abs().max() <= (1e-12 if dtype == torch.float64 else 2e-3)


def test_gradients_are_those_of_the_reference():
    (new, total), heads = ROWS["turn"], HEADS["grouped"]
    *qkv, starts = inputs(new, total, heads, gap=0)
    qkv = [t.nan_to_num().requires_grad_() for t in qkv]
    grads = []
    for run in (attention, attention_reference.attend_rows):
        grads.append(torch.autograd.grad(run(*qkv, new, starts, total, window=4).square().sum(), qkv))
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


GOOD = {
    "query": torch.randn(5, 4, 8),
    "keys": torch.randn(2, 20, 8),
    "values": torch.randn(2, 20, 6),
    "cu_seqlens": int32([0, 2, 2, 5]),
    "starts": int32([3, 0, 9]),
    "lengths": int32([4, 2, 9]),
    "max_query": 3,
    "max_length": 9,
    "scale": 0.3,
    "window": None,
    "softcap": None,
    "sinks": None,
}
REFUSED = [
    ({"query": GOOD["query"].bfloat16()}, TypeError, "one floating dtype"),
    ({"query": GOOD["query"].long()}, TypeError, "one floating dtype"),
    ({"keys": GOOD["keys"].double()}, TypeError, "one floating dtype"),
    ({"query": torch.zeros(()), "scale": None}, ValueError, r"query must be \[T, H, D\]"),
    ({"query": GOOD["query"][0]}, ValueError, r"query must be \[T, H, D\]"),
    ({"query": GOOD["query"][:, :3]}, ValueError, "H a multiple of H_kv"),
    ({"query": GOOD["query"][..., :7]}, ValueError, "keys"),
    ({"keys": GOOD["keys"][:1]}, ValueError, "keys"),
    ({"keys": GOOD["keys"][:0], "values": GOOD["values"][:0]}, ValueError, "H a multiple of H_kv"),
    ({"values": GOOD["values"][:, :19]}, ValueError, "values"),
    ({"cu_seqlens": GOOD["cu_seqlens"].long()}, TypeError, "cu_seqlens must be int32"),
    ({"starts": GOOD["starts"].float()}, TypeError, "starts must be int32"),
    ({"lengths": GOOD["lengths"][:2]}, ValueError, r"starts and lengths \[R\]"),
    ({"cu_seqlens": GOOD["cu_seqlens"][:3]}, ValueError, r"cu_seqlens must be \[R \+ 1\]"),
    ({"starts": GOOD["starts"][None]}, ValueError, r"starts and lengths \[R\]"),
    ({"cu_seqlens": int32([0, 2, 2, 4])}, ValueError, "5 tokens of query"),
    ({"cu_seqlens": int32([1, 2, 2, 5])}, ValueError, "cu_seqlens must rise from 0"),
    ({"cu_seqlens": int32([0, 3, 2, 5])}, ValueError, "must not fall"),
    ({"starts": int32([-1, 0, 9])}, ValueError, "row 0 has keys -1 to 3"),
    ({"starts": int32([3, 0, 12])}, ValueError, "row 2 has keys 12 to 21, there are 20"),
    ({"starts": int32([3, 0, 2**31 - 1])}, ValueError, "row 2 has keys"),
    ({"lengths": int32([4, -1, 9])}, ValueError, "row 1 has keys"),
    ({"lengths": int32([1, 2, 9])}, ValueError, "row 0 asks with 2 tokens and has 1 keys"),
    ({"window": 0}, ValueError, "window must be at least 1"),
    ({"softcap": 0.0}, ValueError, "softcap must be above 0"),
    ({"softcap": float("nan")}, ValueError, "softcap must be above 0"),
    ({"scale": float("inf")}, ValueError, "scale must be finite"),
    ({"sinks": torch.zeros(3)}, ValueError, r"sinks must be floating \[4\]"),
    ({"sinks": torch.zeros(4).long()}, ValueError, "sinks must be floating"),
    ({"sinks": torch.zeros(4, device="meta")}, ValueError, "query is on cpu, sinks on meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_refusals(change, error, message):
    arguments = {**GOOD, **change}
    positional = [arguments.pop(name) for name in ("query", "keys", "values", "cu_seqlens", "starts", "lengths")]
    with pytest.raises(error, match=message):
        ops.ragged_attention(*positional, **arguments)


@pytest.mark.skipif(ops.EXTENSION_ERROR is not None, reason=f"no extension: {ops.EXTENSION_ERROR}")
@pytest.mark.parametrize(
    "change", [change for change, _, _ in REFUSED if "scale" not in change and "sinks" not in change]
)
def test_the_kernel_refuses_for_itself(change):
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.drllm_fast.ragged_attention(*{**GOOD, **change}.values())


@DTYPES
def test_opcheck(dtype):
    arguments = [t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in GOOD.values()]
    opcheck(torch.ops.drllm_fast.ragged_attention.default, tuple(arguments))
    arguments[-3:] = 3, 2.0, torch.zeros(4)
    opcheck(torch.ops.drllm_fast.ragged_attention.default, tuple(arguments))


def test_one_graph_for_all_shapes():
    torch._dynamo.reset()

    def attend(query, keys, values, cu_seqlens, starts, lengths, longest):
        out = ops.ragged_attention(
            query, keys, values, cu_seqlens, starts, lengths, max_query=longest, max_length=longest, window=9
        )
        return out * 2

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for new, total in (([2, 3], [9, 3]), ([4, 0, 5], [4, 2, 70]), ([1] * 7, [8] * 7)):
        query, keys, values, _, starts, _ = slot(new, total, 4, 2, 16, 16, torch.float32)
        arguments = query, keys, values, int32([0, *accumulate(new)]), int32(starts), int32(total), max(total)
        with torch.no_grad():
            assert torch.equal(compiled(*arguments), attend(*arguments))


@pytest.mark.skipif(ops.EXTENSION_ERROR is not None, reason=f"no extension: {ops.EXTENSION_ERROR}")
def test_the_kernel_is_in_front_of_the_reference():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("drllm_fast::ragged_attention", "CPU")
