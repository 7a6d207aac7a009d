"""What the router computes, in plain torch: the specification of every faster router in this package.

    pool_windows   row b has n_b tokens; W_b = min(windows, n_b) windows of s_b = n_b // W_b tokens each
                   pooled[b, w] = mean of hidden[cu_seqlens[b] + w s_b : cu_seqlens[b] + (w + 1) s_b]   for w < W_b
                   The last n_b - W_b s_b tokens of the row belong to no window.
    router_logits  logits[b] = mean over w < W_b of  W2 gelu(W1 pooled[b, w] + b1) + b2     (GELU in its tanh form)

After Dr.LLM (arXiv 2510.12773), where W = 8 and the router is as wide as 128: the windows keep some of the order of a
long prompt, and the logits, not the windows, are averaged. Both are computed in fp32, whatever the dtype of the input
and whether or not autocast is on.

A row without tokens has no windows. Its logits are zeros: no class is favoured, and a tie means that the block is
executed once (`drllm_fast.routers.choose`).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 3  # skip, execute, repeat


def pool_windows(hidden: Tensor, cu_seqlens: Tensor, windows: int) -> tuple[Tensor, Tensor]:
    """Windowed means of the packed rows: pooled fp32 [B, windows, d] and counts int64 [B], the W_b of each row.

    hidden      floating [P, d], the tokens of all rows end to end; any strides
    cu_seqlens  int32 or int64 [B + 1], from 0 to P: row b owns hidden[cu_seqlens[b] : cu_seqlens[b + 1]]
    windows     at least 1; windows that a row does not use are zero

    Waits for the device once, to read cu_seqlens. Raises TypeError or ValueError.
    """
    if not hidden.is_floating_point() or hidden.ndim != 2:
        raise ValueError(f"hidden must be floating [P, d], got {hidden.dtype} {list(hidden.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise ValueError(f"cu_seqlens must be [B + 1], got {list(cu_seqlens.shape)}")
    if windows < 1:
        raise ValueError(f"windows must be at least 1, got {windows}")
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != len(hidden) or any(start > end for start, end in pairwise(ends)):
        raise ValueError(f"cu_seqlens must rise from 0 to the {len(hidden)} tokens of hidden, got {ends}")

    pooled = hidden.new_zeros(len(ends) - 1, windows, hidden.shape[1], dtype=torch.float32)
    counts = []
    for row, (start, end) in enumerate(pairwise(ends)):
        used = min(windows, end - start)
        counts.append(used)
        if used:
            size = (end - start) // used
            tokens = hidden[start : start + used * size].float()
            pooled[row, :used] = tokens.unflatten(0, (used, size)).mean(dim=1)
    return pooled, torch.tensor(counts, dtype=torch.int64, device=hidden.device)


def router_logits(pooled: Tensor, counts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The router's logits, fp32 [B, 3]: the mean over each row's windows of its two-layer perceptron.

    pooled  floating [B, windows, d] and counts integer [B], as `pool_windows` returns them
    w1 [h, d], b1 [h], w2 [3, h], b2 [3], floating

    Differentiable. Rows with counts 0 get zeros. Raises ValueError for shapes that do not belong together.
    """
    shapes = [list(t.shape) for t in (w1, b1, w2, b2)]
    width, hidden_size = w1.shape if w1.ndim == 2 else (0, 0)
    if shapes != [[width, hidden_size], [width], [CLASSES, width], [CLASSES]]:
        raise ValueError(f"w1, b1, w2, b2 must be [h, d], [h], [{CLASSES}, h], [{CLASSES}], got {shapes}")
    if pooled.ndim != 3 or pooled.shape[2] != hidden_size or counts.shape != pooled.shape[:1]:
        raise ValueError(
            f"pooled must be [B, windows, {hidden_size}] and counts [B], got {list(pooled.shape)} and "
            f"{list(counts.shape)}"
        )
    with torch.autocast(pooled.device.type, enabled=False):
        inner = F.gelu(F.linear(pooled.float(), w1.float(), b1.float()), approximate="tanh")
        each = F.linear(inner, w2.float(), b2.float())  # [B, windows, 3]
    used = torch.arange(pooled.shape[1], device=pooled.device) < counts.unsqueeze(1)  # [B, windows]
    return each.masked_fill(~used.unsqueeze(2), 0).sum(dim=1) / counts.clamp(min=1).unsqueeze(1)
