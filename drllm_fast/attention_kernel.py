"""Causal attention of packed rows over keys that lie in segments, for CUDA: the op `ragged_attention`.

Row i asks with its last n_i = cu_seqlens[i + 1] - cu_seqlens[i] tokens; its m_i = lengths[i] keys lie at starts[i]. The
j-th of its queries sees the keys k <= m_i - n_i + j, with a `window` only the last `window` of those.

    out[j] = sum_k softmax_k(s_jk) values[k]      s_jk = scale q_j . k_k, with a softcap c: c tanh(scale q_j . k_k / c)

query [T, H, D], keys [H_kv, N, D], values [H_kv, N, D_v] -> out [T, H, D_v]; float32, bfloat16 or float16, sums in
float32. Oracle: `drllm_fast.attention_reference`.

The G = H / H_kv heads of a group ask the same keys, so a row's n_i G queries of one KV head, token by token, are the
rows of one matrix; a program takes a tile of it. Few queries leave most of a GPU idle: there a tile's keys are split
over programs, and `combine_kernel` adds up, in the order of the keys, what they found. Splits begin at multiples of a
fixed length in the row, so a row that decodes is summed in the same order alone and in a batch, up to MAX_PROGRAMS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Keys a program takes where keys are split, if that makes no more than MAX_PROGRAMS programs; a power of 2 times it
# if it does, which bounds the workspace too.
SPLIT = 256
MAX_PROGRAMS = 4096
# Keys are split for rows that ask with no more tokens than this, and where there would be fewer programs than this.
MAX_DECODE = 16
FEW_PROGRAMS = 128

BLOCK_ROWS = 128  # rows looked at together in the search for a program's row
BLOCK_SPLITS = 16  # splits combined together

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(
    acc, top, total, query, key_ptrs, value_ptrs, start, first, stop, end, position, keys_token, values_token,
    scale, softcap, window,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One pass of the online softmax over the blocks of keys from `first` to `stop`; there are no keys from `end` on.

    Scores are in units of log2(e), so that exp2 is the exponential. Not MASKED: every query sees all of these keys.
    """
    at = tl.arange(0, BLOCK_N)
    dims, dims_v = tl.arange(0, BLOCK_D)[None, :] < DIM, tl.arange(0, BLOCK_DV)[None, :] < DIM_V
    for block in range(first, stop, BLOCK_N):
        if MASKED:
            inside = (block + at < end)[:, None]
            keys = tl.load(key_ptrs + (start + block) * keys_token, mask=inside & dims, other=0)
            values = tl.load(value_ptrs + (start + block) * values_token, mask=inside & dims_v, other=0)
        else:
            keys = tl.load(key_ptrs + (start + block) * keys_token, mask=dims, other=0)
            values = tl.load(value_ptrs + (start + block) * values_token, mask=dims_v, other=0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        if CAPPED:
            scores = softcap * (2 * tl.sigmoid(2 * scores) - 1)
        if MASKED:
            seen = (block + at)[None, :] <= position[:, None]
            if WINDOWED:
                seen = seen & ((block + at)[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        before = top
        top = tl.maximum(before, tl.max(scores, 1))
        shift = top
        if MASKED:
            shift = tl.where(top == float("-inf"), 0, top)  # it has seen no key yet
        weights = tl.exp2(scores - shift[:, None])
        faded = tl.exp2(before - shift)
        total = total * faded + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * faded[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit(do_not_specialize=["rows", "tiles", "window"])
def ragged_attention_kernel(
    query_ptr, keys_ptr, values_ptr, cu_seqlens_ptr, starts_ptr, lengths_ptr, sinks_ptr,
    out_ptr,  # [T, H, D_v]; where keys are split fp32 [T, H, splits, D_v], not yet divided by the weights' sum
    tops_ptr, totals_ptr,  # where keys are split, fp32 [T, H, splits]: largest score, or -inf, and sum of the weights
    query_token, query_head, keys_token, keys_head, values_token, values_head,
    rows, tiles, scale, softcap, window,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr, SPLIT: tl.constexpr, SEARCH: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of queries x H_kv x splits. SEARCH: see below; else every row has `tiles` of them. SPLIT: keys a
    program takes, 0 for all."""
    program, kv_head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    if SEARCH:
        # Row i owns the programs from cu_seqlens[i] G // BLOCK_M + i on: enough for its tiles, and at most one more.
        row = -1
        for block in range(0, rows, BLOCK_ROWS):
            candidates = block + tl.arange(0, BLOCK_ROWS)
            begins = tl.load(cu_seqlens_ptr + candidates, mask=candidates < rows, other=0)
            before = (begins * GROUP // BLOCK_M + candidates <= program) & (candidates < rows)
            row += tl.sum(before.to(tl.int32))
        tile = program - (tl.load(cu_seqlens_ptr + row) * GROUP // BLOCK_M + row)
    else:
        row, tile = program // tiles, program % tiles
    begin = tl.load(cu_seqlens_ptr + row)
    new = tl.load(cu_seqlens_ptr + row + 1) - begin
    if tile * BLOCK_M >= new * GROUP:
        return
    start = tl.load(starts_ptr + row).to(tl.int64)
    length = tl.load(lengths_ptr + row)

    at = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    asked = at < new * GROUP
    position = length - new + at // GROUP
    first_position = length - new + tile * BLOCK_M // GROUP
    last_position = tl.minimum(length - new + (tile * BLOCK_M + BLOCK_M - 1) // GROUP, length - 1)
    token = (begin + at // GROUP).to(tl.int64)
    head = kv_head * GROUP + at % GROUP

    d, dv = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    query_ptrs = query_ptr + token[:, None] * query_token + head[:, None] * query_head + d
    query = tl.load(query_ptrs, mask=asked[:, None] & (d < DIM), other=0)
    in_block = tl.arange(0, BLOCK_N).to(tl.int64)[:, None]
    key_ptrs = keys_ptr + kv_head * keys_head + in_block * keys_token + d
    value_ptrs = values_ptr + kv_head * values_head + in_block * values_token + dv

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    oldest = 0
    if WINDOWED:
        oldest = tl.maximum(first_position - window + 1, 0)
    low, high = oldest // BLOCK_N * BLOCK_N, last_position + 1
    if SPLIT:
        low = tl.maximum((oldest // SPLIT + split) * SPLIT, low)
        high = tl.minimum((oldest // SPLIT + split + 1) * SPLIT, high)
        acc, top, total = _attend(
            acc, top, total, query, key_ptrs, value_ptrs, start, low, high, high, position, keys_token, values_token,
            scale, softcap, window,
            DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, WINDOWED, CAPPED, True,
        )  # fmt: skip
    else:
        seen_by_all = low
        if WINDOWED:
            # Where the window of the last query begins; the blocks before it are masked.
            seen_by_all = tl.maximum(tl.cdiv(last_position - window + 1, BLOCK_N) * BLOCK_N, low)
            acc, top, total = _attend(
                acc, top, total, query, key_ptrs, value_ptrs, start, low, seen_by_all, high, position, keys_token,
                values_token, scale, softcap, window,
                DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, WINDOWED, CAPPED, True,
            )  # fmt: skip
        diagonal = tl.maximum((first_position + 1) // BLOCK_N * BLOCK_N, seen_by_all)
        acc, top, total = _attend(
            acc, top, total, query, key_ptrs, value_ptrs, start, seen_by_all, diagonal, high, position, keys_token,
            values_token, scale, softcap, window,
            DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, WINDOWED, CAPPED, False,
        )  # fmt: skip
        acc, top, total = _attend(
            acc, top, total, query, key_ptrs, value_ptrs, start, diagonal, high, high, position, keys_token,
            values_token, scale, softcap, window,
            DIM, DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, WINDOWED, CAPPED, True,
        )  # fmt: skip

    index = token * (tl.num_programs(1) * GROUP) + head
    if SPLIT:
        index = index * tl.num_programs(2) + split
        tl.store(tops_ptr + index, top, mask=asked)
        asked = asked & (top > float("-inf"))
        tl.store(totals_ptr + index, total, mask=asked)
    else:
        if SINKS:
            sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
            most = tl.maximum(top, sink)
            acc = acc * tl.exp2(top - most)[:, None]
            total = total * tl.exp2(top - most) + tl.exp2(sink - most)
        acc = acc / total[:, None]
    tl.store(
        out_ptr + index[:, None] * DIM_V + dv, acc.to(out_ptr.dtype.element_ty), mask=asked[:, None] & (dv < DIM_V)
    )


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    acc_ptr, tops_ptr, totals_ptr, sinks_ptr, out_ptr, splits,
    DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """out [T, H, D_v] from what `ragged_attention_kernel` found in each split; of a split without keys in sight nothing
    but its top, -inf, is read. Programs: T x H."""
    head = tl.program_id(1)
    index = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head
    at, dv = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DV)

    tops = tl.full([BLOCK_SPLITS], float("-inf"), tl.float32)
    for block in range(0, splits, BLOCK_SPLITS):
        inside = block + at < splits
        tops = tl.maximum(tops, tl.load(tops_ptr + index * splits + block + at, mask=inside, other=float("-inf")))
    most = tl.max(tops)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        most = tl.maximum(most, sink)

    acc = tl.zeros([BLOCK_SPLITS, BLOCK_DV], tl.float32)
    totals = tl.zeros([BLOCK_SPLITS], tl.float32)
    for block in range(0, splits, BLOCK_SPLITS):
        split = index * splits + block + at
        tops = tl.load(tops_ptr + split, mask=block + at < splits, other=float("-inf"))
        found, faded = tops > float("-inf"), tl.exp2(tops - most)
        totals += tl.load(totals_ptr + split, mask=found, other=0) * faded
        mask = found[:, None] & (dv < DIM_V)[None, :]
        acc += tl.load(acc_ptr + split[:, None] * DIM_V + dv[None, :], mask=mask, other=0) * faded[:, None]
    total = tl.sum(totals)
    if SINKS:
        total += tl.exp2(sink - most)
    out = tl.sum(acc, 0) / total
    tl.store(out_ptr + index * DIM_V + dv, out.to(out_ptr.dtype.element_ty), mask=dv < DIM_V)


def block_sizes(queries: int, block_d: int, dtype: torch.dtype, major: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, num_warps, num_stages for rows of `queries` = n G queries and heads padded to `block_d`.

    Chosen for what fits a device of compute capability `major`, not by timing: no spilled registers, at most 99 KB of
    shared memory."""
    if dtype == torch.float32:  # multiplied without tensor cores, one operand in registers
        most, block_n = 16, 32 if block_d <= 128 else 16
    elif block_d > 128:
        most, block_n = (64, 32) if block_d <= 256 else (16, 16)
    else:
        # Only wgmma and tcgen05, which take 64 queries or more, read the keys from shared memory; elsewhere wide blocks
        # of wide heads spill.
        most, block_n = 128, 64 if queries > 32 and (block_d <= 64 or major in (9, 10)) else 32
    block_m = min(max(triton.next_power_of_2(queries), 16), most)
    if dtype == torch.float32:
        return block_m, block_n, 8, 2 if block_n == 32 else 3
    return block_m, block_n, 8 if block_m * block_d > 4096 else 4, 3 if block_n * block_d <= 4096 else 2


def split_length(tiles: int, max_query: int, max_length: int, window: int | None) -> tuple[int, int]:
    """Keys in a split, and how many splits, for rows of at most max_query tokens and max_length keys whose queries make
    `tiles` programs; (0, 1) where keys are not split."""
    length = SPLIT
    while True:
        splits = triton.cdiv(max_length, length)
        if window is not None:  # that many keys touch this many splits, wherever they begin
            splits = min(splits, (window + max_query - 1 + length - 2) // length + 1)
        if splits <= 1 or (max_query > MAX_DECODE and tiles >= FEW_PROGRAMS):
            return 0, 1
        if tiles * splits <= MAX_PROGRAMS:
            return length, splits
        length *= 2


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    starts: Tensor,
    lengths: Tensor,
    max_query: int,
    max_length: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [T, H, D], keys [H_kv, N, D], values [H_kv, N, D_v] -> [T, H, D_v]; see `drllm_fast.ops`.

    It never waits for the device, and what it launches depends on shapes, max_query and max_length alone."""
    (tokens, heads, dim), kv_heads, dim_v = query.shape, keys.shape[0], values.shape[2]
    rows, group = starts.shape[0], heads // kv_heads
    out = query.new_empty(tokens, heads, dim_v)
    if out.numel() == 0:
        return out
    query, keys, values = (t if t.stride(2) == 1 else t.contiguous() for t in (query, keys, values))
    cu_seqlens, starts, lengths = (t.contiguous() for t in (cu_seqlens, starts, lengths))
    sinks = sinks if sinks is None else sinks.contiguous()

    block_d, block_dv = (max(triton.next_power_of_2(n), 16) for n in (dim, dim_v))
    max_query = min(max_query, tokens)
    window = None if window is None or window >= max_length else window
    major = torch.cuda.get_device_capability(query.device)[0] if query.is_cuda else 9  # 9: the interpreter
    block_m, block_n, num_warps, num_stages = block_sizes(max_query * group, max(block_d, block_dv), query.dtype, major)
    tiles = triton.cdiv(max_query * group, block_m)
    programs = min(rows * tiles, tokens * group // block_m + rows)
    split, splits = split_length(programs * kv_heads, max_query, max_length, window)
    if split:
        acc = query.new_empty(tokens, heads, splits, dim_v, dtype=torch.float32)
        tops, totals = query.new_empty(2, tokens, heads, splits, dtype=torch.float32)
    else:
        acc, tops, totals = out, None, None

    with torch.cuda.device_of(query):
        ragged_attention_kernel[programs, kv_heads, splits](
            query, keys, values, cu_seqlens, starts, lengths, sinks, acc, tops, totals,
            query.stride(0), query.stride(1), keys.stride(1), keys.stride(0), values.stride(1), values.stride(0),
            rows, tiles, scale * LOG2_E.value if softcap is None else scale / softcap,
            0.0 if softcap is None else softcap * LOG2_E.value, window or 0,
            DIM=dim, DIM_V=dim_v, BLOCK_D=block_d, BLOCK_DV=block_dv, GROUP=group,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_ROWS=BLOCK_ROWS, SPLIT=split, SEARCH=programs < rows * tiles,
            WINDOWED=window is not None, CAPPED=softcap is not None, SINKS=sinks is not None,
            num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        if split:
            combine_kernel[tokens, heads](
                acc, tops, totals, sinks, out, splits,
                DIM_V=dim_v, BLOCK_DV=block_dv, BLOCK_SPLITS=BLOCK_SPLITS, SINKS=sinks is not None,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out
