"""The router of one block for a packed batch: one kernel, and the zeroing of B counters before it. Its oracle is
`router_reference.router`.

    n_b tokens in row b, W_b = min(windows, n_b), s_b = n_b // W_b
    z[b, w]    = W1 (sum of x over the s_b tokens of window w) / s_b + b1
    logits[b]  = W2 (mean over w of gelu(z[b, w])) + b2 - cost        (GELU in its tanh form; -cost where n_b = 0)
    decisions  = skip or repeat where that logit alone is the largest, else execute

    x [T, d], cu_seqlens int32 [B + 1], w1 [h, d], b1 [h], w2 [3, h], b2 [3], cost [3] -> fp32 [B, 3], int8 [B]

Each window is cut into segments of at most TOKENS tokens. A program owns TILE consecutive segments, whichever rows they
are from, a share of the d columns (`split`) and at most 128 of the h hidden units (`chunk`); it finds them from
cu_seqlens alone, so that nothing waits for the host, and prompts of any mix of lengths fill the card evenly. It pools
[TILE, BLOCK_D] columns at a time and multiplies them with W1 at once, since the first layer is linear: what it passes
on is a piece of h numbers for each window, not of d. Pieces lie at tile + window, windows counted over the whole batch:
both only rise, so that no two pairs share a place, and the pieces of a window lie one after the other.

The program that arrives last at a row sums the pieces in the order in which they lie and finishes the row. Which one
that is changes from run to run, the result does not: no floating-point atomics.

W1 is multiplied in three TF32 products (22 of fp32's 24 bits), as `ieee` would leave the tensor cores idle. A program
reads x once; for h above 128 those that share x are neighbours in the grid, and all but the first find it in L2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 32  # of a segment
TILE = 16  # segments of a program; with 32, TF32 operands in three parts take 217 registers instead of 166
SCAN = 256  # rows whose segments are counted at a time
BLOCK_D = 32
MAX_BLOCK_H = 128
PROGRAMS = 384  # to aim for: three fit on a multiprocessor, of which an H100 has 132
MAX_H = 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _windows_of(length, windows, TOKENS: tl.constexpr):
    """windows, tokens of a window, segments of a window. A row without tokens has one segment, so that it is finished
    like any other."""
    count = tl.maximum(tl.minimum(length, windows), 1)
    size = length // count
    return count, size, tl.maximum((size + TOKENS - 1) // TOKENS, 1)


@triton.jit
def _finish_row(
    row, first_segment, first_window, splits,
    cu_ptr, b1_ptr, w2_ptr, b2_ptr, cost_ptr, pieces_ptr, logits_ptr, decisions_ptr, h, windows,
    TOKENS: tl.constexpr, TILE: tl.constexpr, BLOCK_H: tl.constexpr, WINDOWS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Logits and decision of a row whose pieces are all there; first_segment and first_window count those before it."""
    length = tl.load(cu_ptr + row + 1) - tl.load(cu_ptr + row)
    count, size, parts = _windows_of(length, windows, TOKENS)
    class_at = tl.arange(0, 4)
    logits = tl.zeros([4], tl.float32)
    for start in range(0, h, BLOCK_H):
        hidden = start + tl.arange(0, BLOCK_H)
        bias = tl.load(b1_ptr + hidden, mask=hidden < h, other=0).to(tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        for first in range(0, count, WINDOWS):
            window = first + tl.arange(0, WINDOWS)
            segment = first_segment + window * parts
            tile = segment // TILE
            pieces = tl.where(window < count, ((segment + parts - 1) // TILE - tile + 1) * splits, 0)
            place = (tile + first_window + window).to(tl.int64) * splits
            summed = tl.zeros([WINDOWS, PIECES, BLOCK_H], tl.float32)
            for done in range(0, tl.max(pieces, 0), PIECES):
                piece = done + tl.arange(0, PIECES)
                mask = (piece[None, :] < pieces[:, None])[:, :, None] & (hidden < h)[None, None, :]
                at = (place[:, None] + piece[None, :])[:, :, None] * h + hidden[None, None, :]
                # Past L1, which may hold the line from before another program wrote its piece.
                summed += tl.load(pieces_ptr + at, mask=mask, other=0, cache_modifier=".cg")
            z = tl.sum(summed, 1) / tl.maximum(size, 1).to(tl.float32) + bias[None, :]
            # z (1 + tanh u) / 2 = z sigmoid(2 u)
            gelu = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
            total += tl.sum(tl.where((window < count)[:, None], gelu, 0.0), 0)
        w2_at = class_at[:, None] * h + hidden[None, :]
        w2 = tl.load(w2_ptr + w2_at, mask=(class_at < 3)[:, None] & (hidden < h)[None, :], other=0).to(tl.float32)
        logits += tl.sum(w2 * total[None, :], 1)
    logits = logits / count.to(tl.float32) + tl.load(b2_ptr + class_at, mask=class_at < 3, other=0).to(tl.float32)
    cost = tl.load(cost_ptr + class_at, mask=class_at < 3, other=0).to(tl.float32)
    logits = tl.where(length > 0, logits, 0.0) - cost
    tl.store(logits_ptr + row.to(tl.int64) * 3 + class_at, logits, mask=class_at < 3)
    skip = tl.sum(tl.where(class_at == 0, logits, 0.0), 0)
    execute = tl.sum(tl.where(class_at == 1, logits, 0.0), 0)
    repeat = tl.sum(tl.where(class_at == 2, logits, 0.0), 0)
    # Two comparisons each: a maximum would lose a NaN, and every comparison with one is false.
    decision = tl.where((skip > execute) & (skip > repeat), 0, 1)
    decision = tl.where((repeat > execute) & (repeat > skip), 2, decision)
    tl.store(decisions_ptr + row, decision.to(tl.int8))


@triton.jit(do_not_specialize=["rows", "windows", "splits", "slices"])
def router_kernel(
    x_ptr, cu_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, cost_ptr, pieces_ptr, arrived_ptr, logits_ptr, decisions_ptr,
    rows, stride_x, d, h, windows, splits, slices,
    TOKENS: tl.constexpr, TILE: tl.constexpr, SCAN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    WINDOWS: tl.constexpr, PIECES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(h, BLOCK_H)
    program = tl.program_id(0).to(tl.int64)
    tile = program // chunks
    hidden = (program % chunks) * BLOCK_H + tl.arange(0, BLOCK_H)
    split = tl.program_id(1).to(tl.int64)

    # For each of the tile's segments: its row, and the segments and windows of all rows before that.
    first_of_tile = (tile * TILE).to(tl.int32)
    segment = first_of_tile + tl.arange(0, TILE)
    row = tl.zeros([TILE], tl.int32)
    first_segment = tl.zeros([TILE], tl.int32)
    first_window = tl.zeros([TILE], tl.int32)
    total = 0
    for start in range(0, rows, SCAN):
        each = start + tl.arange(0, SCAN)
        begin = tl.load(cu_ptr + each, mask=each < rows, other=0)
        end = tl.load(cu_ptr + each + 1, mask=each < rows, other=0)
        count, size, parts = _windows_of(end - begin, windows, TOKENS)
        segments = tl.where(each < rows, count * parts, 0)
        before = (total + tl.cumsum(segments, 0))[None, :] <= segment[:, None]
        before = before & (each < rows)[None, :]
        row += tl.sum(before.to(tl.int32), 1)
        first_segment += tl.sum(tl.where(before, segments[None, :], 0), 1)
        first_window += tl.sum(tl.where(before, count[None, :], 0), 1)
        total += tl.sum(segments, 0)
    if first_of_tile >= total:
        return

    valid = row < rows
    begin = tl.load(cu_ptr + row, mask=valid, other=0)
    end = tl.load(cu_ptr + row + 1, mask=valid, other=0)
    count, size, parts = _windows_of(end - begin, windows, TOKENS)
    local = segment - first_segment
    window = local // parts
    skipped = (local - window * parts) * TOKENS
    token = (begin + window * size + skipped).to(tl.int64)
    length = tl.where(valid, tl.minimum(size - skipped, TOKENS), 0)
    longest = tl.max(length, 0)

    acc = tl.zeros([TILE, BLOCK_H], tl.float32)
    for i in range(split * slices, tl.minimum((split + 1) * slices, tl.cdiv(d, BLOCK_D))):
        column = i * BLOCK_D + tl.arange(0, BLOCK_D)
        pooled = tl.zeros([TILE, BLOCK_D], tl.float32)
        for done in range(0, longest, UNROLL):
            for more in tl.static_range(UNROLL):  # loads of several tokens in flight
                at = (token + (done + more))[:, None] * stride_x + column[None, :]
                mask = (done + more < length)[:, None] & (column < d)[None, :]
                pooled += tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
        w1_at = hidden[None, :] * d + column[:, None]
        w1 = tl.load(w1_ptr + w1_at, mask=(hidden < h)[None, :] & (column < d)[:, None], other=0).to(tl.float32)
        acc = tl.dot(pooled, w1, acc, input_precision="tf32x3")

    # The tile's segments of one window make one piece. Sums are masked: a product with 0 and 1 would carry the NaN of
    # one row into the others.
    window += first_window
    lowest, highest = tl.min(tl.where(valid, window, 2147483647), 0), tl.max(tl.where(valid, window, -1), 0)
    if highest - lowest + 1 == tl.sum(valid.to(tl.int32), 0):
        at = ((tile + window) * splits + split)[:, None] * h + hidden[None, :]
        tl.store(pieces_ptr + at, acc, mask=valid[:, None] & (hidden < h)[None, :])
    else:
        for one in range(lowest, highest + 1):
            piece = tl.sum(tl.where((window == one)[:, None], acc, 0.0), 0)
            tl.store(pieces_ptr + ((tile + one) * splits + split) * h + hidden, piece, mask=hidden < h)

    # The pieces of all threads before the count, the count before the pieces of others are read.
    tl.debug_barrier()
    enters = valid & ((local == 0) | (segment == first_of_tile))  # the first segment of each row in this tile
    last_tile = (first_segment + count * parts - 1) // TILE
    expected = (last_tile - first_segment // TILE + 1) * splits * chunks
    one_more = tl.full([TILE], 1, tl.int32)
    arrived = tl.atomic_add(arrived_ptr + row, one_more, mask=enters, sem="acq_rel", scope="gpu")
    finishes = enters & (arrived + 1 == expected)
    tl.debug_barrier()
    if tl.sum(finishes.to(tl.int32), 0) > 0:
        for place in range(TILE):
            this = finishes & (segment == first_of_tile + place)
            if tl.sum(this.to(tl.int32), 0) > 0:
                done = tl.sum(tl.where(this, row, 0), 0)
                _finish_row(
                    done,
                    tl.sum(tl.where(this, first_segment, 0), 0),
                    tl.sum(tl.where(this, first_window, 0), 0),
                    splits,
                    cu_ptr, b1_ptr, w2_ptr, b2_ptr, cost_ptr, pieces_ptr, logits_ptr, decisions_ptr, h, windows,
                    TOKENS, TILE, BLOCK_H, WINDOWS, PIECES,
                )  # fmt: skip


def supports(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, cost: Tensor) -> bool:
    """Whether `router` takes these: no fp64 or fp8, 1 to 1024 hidden units, at least one column."""
    return 1 <= w1.shape[0] <= MAX_H and w1.shape[1] >= 1 and all(t.dtype in DTYPES for t in (x, w1, b1, w2, b2, cost))


def constants(h: int) -> dict[str, int]:
    """The kernel's constexprs and num_warps for routers of h hidden units."""
    block_h = min(64 if h <= 64 else 128, MAX_BLOCK_H)
    return {
        "TOKENS": TOKENS,
        "TILE": TILE,
        "SCAN": SCAN,
        "BLOCK_D": BLOCK_D,
        "BLOCK_H": block_h,
        "WINDOWS": 4,
        "PIECES": 1024 // block_h,
        "UNROLL": 8,
        "num_warps": 4,
    }


def router(
    x: Tensor, cu_seqlens: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, cost: Tensor, windows: int
) -> tuple[Tensor, Tensor]:
    """See the top of this file. cu_seqlens is taken at its word: reading it would wait for the device."""
    rows, (tokens, d), h = cu_seqlens.shape[0] - 1, x.shape, w1.shape[0]
    logits = x.new_empty(rows, 3, dtype=torch.float32)
    decisions = x.new_empty(rows, dtype=torch.int8)
    if not rows:
        return logits, decisions
    x = x if x.stride(1) == 1 else x.contiguous()
    cu_seqlens, w1, b1, w2, b2, cost = (t.contiguous() for t in (cu_seqlens, w1, b1, w2, b2, cost))

    # What the host knows without cu_seqlens. Every segment has a token, but for those of empty rows.
    chosen = constants(h)
    segments = min(tokens // TOKENS + rows * windows, tokens + rows)
    tiles, chunks = triton.cdiv(segments, TILE), triton.cdiv(h, chosen["BLOCK_H"])
    slices = triton.cdiv(d, BLOCK_D)
    of_a_program = triton.cdiv(slices, min(slices, triton.cdiv(PROGRAMS, tiles * chunks)))
    splits = triton.cdiv(slices, of_a_program)
    pieces = x.new_empty(tiles + min(rows * windows, tokens + rows), splits, h, dtype=torch.float32)

    arrived = x.new_zeros(rows, dtype=torch.int32)
    with torch.cuda.device_of(x):
        router_kernel[(tiles * chunks, splits)](
            x, cu_seqlens, w1, b1, w2, b2, cost, pieces, arrived, logits, decisions,
            rows, x.stride(0), d, h, windows, splits, of_a_program,
            **chosen, enable_fp_fusion=True,
        )  # fmt: skip
    return logits, decisions
