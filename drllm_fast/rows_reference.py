"""What the row ops compute, in plain torch: the specification of the kernels in csrc, and what runs where none does.

    active_tokens     index = the positions of the tokens of every row b with decisions[b] >= at_least
    visit_rows        the same for both visits of a block at once, into buffers whose sizes the decisions do not change
    gather_rows       out[i] = x[index[i]]
    scatter_rows      out = x, except out[index[i]] = y[i]
    scatter_add_rows  out = x, except out[index[i]] = x[index[i]] + y[i]
    gather_rms_norm   gathered[i] = x[index[i]],  normed[i] = weight * gathered[i] / sqrt(mean(gathered[i]^2) + eps)

An index of -1 is no row: zeros where it is gathered, nothing where it is scattered.

On the CPU values are checked too. On other devices that would wait for the device, so there only shapes, dtypes and
devices are; torch's own indexing stops at a position out of range.
"""

import math

import torch
from torch import Tensor

from drllm_fast.registration import check_integer

DECISIONS = range(0, 128)  # what `at_least` may be: the non-negative part of int8
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what can be added and normed


def check_active(decisions: Tensor, cu_seqlens: Tensor, at_least: int) -> None:
    """Raises TypeError or ValueError unless decisions is int8 [B], cu_seqlens int32 [B + 1] on the same device."""
    _check_decisions(decisions, cu_seqlens)
    check_integer("at_least", at_least)
    if at_least not in DECISIONS:
        raise ValueError(f"at_least must be from {DECISIONS[0]} to {DECISIONS[-1]}, got {at_least}")


def check_visits(decisions: Tensor, cu_seqlens: Tensor, tokens: int) -> None:
    """Raises TypeError or ValueError unless decisions is int8 [B], cu_seqlens int32 [B + 1] and tokens not negative."""
    _check_decisions(decisions, cu_seqlens)
    check_integer("tokens", tokens, 0)


def check_rows(x: Tensor, index: Tensor, y: Tensor | None = None) -> None:
    """Raises TypeError or ValueError unless x is [T, d], index int64 [T'] and y [T', d], on one device."""
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    if x.ndim != 2 or index.ndim != 1:
        raise ValueError(f"x must be [T, d] and index [T'], got {list(x.shape)} and {list(index.shape)}")
    if index.device != x.device:
        raise ValueError(f"x is on {x.device}, index on {index.device}; move one of them")
    if y is None:
        return
    if y.dtype != x.dtype:
        raise TypeError(f"y must have the dtype of x, got {y.dtype} and {x.dtype}")
    if y.shape != (index.shape[0], x.shape[1]):
        raise ValueError(
            f"y must be {[index.shape[0], x.shape[1]]}, a row for each entry of index, got {list(y.shape)}"
        )
    if y.device != x.device:
        raise ValueError(f"x is on {x.device}, y on {y.device}; move one of them")


def check_added(x: Tensor, index: Tensor, y: Tensor) -> None:
    """`check_rows`, and x in one of FLOATS."""
    _check_float(x)
    check_rows(x, index, y)


def check_normed(x: Tensor, index: Tensor, weight: Tensor, eps: float) -> None:
    """`check_rows`, x in one of FLOATS, weight [d] of the same dtype and device, and a positive eps."""
    _check_float(x)
    check_rows(x, index)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have the dtype of x, got {weight.dtype} and {x.dtype}")
    if weight.shape != x.shape[1:]:
        raise ValueError(f"weight must be {list(x.shape[1:])}, one for each column of x, got {list(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"x is on {x.device}, weight on {weight.device}; move one of them")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, got {eps}")


def active_tokens(decisions: Tensor, cu_seqlens: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    check_active(decisions, cu_seqlens, at_least)
    _check_offsets(cu_seqlens)
    lengths = cu_seqlens.diff()
    active = decisions >= at_least
    index = active.repeat_interleave(lengths).nonzero().squeeze(1)
    kept = lengths[active]
    cu_active = cu_seqlens.new_zeros(kept.shape[0] + 1)
    torch.cumsum(kept, 0, dtype=torch.int32, out=cu_active[1:])
    return index, cu_active


def visit_rows(decisions: Tensor, cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    check_visits(decisions, cu_seqlens, tokens)
    _check_offsets(cu_seqlens, tokens)
    rows = decisions.shape[0]
    active = torch.stack([decisions >= 1, decisions >= 2])
    kept = cu_seqlens.diff() * active
    ends, rank = kept.cumsum(1), active.cumsum(1)
    total, count = kept.sum(1, keepdim=True), active.sum(1, keepdim=True)

    # Rows that are not active all go to a last column, which is dropped.
    row = torch.arange(rows, dtype=torch.int32, device=decisions.device).expand(2, rows)
    numbers = cu_seqlens.new_full((2, rows + 1), -1).scatter_(1, torch.where(active, rank - 1, rows), row)[:, :rows]
    cu_visits = ends.new_zeros(2, rows + 2).scatter_(1, torch.where(active, rank, rows + 1), ends)[:, : rows + 1]
    slot = torch.arange(rows + 1, device=decisions.device)
    cu_visits = torch.where(slot <= count, cu_visits, total).int()

    # The row of the j-th token is the first that ends behind j; `shift` takes j to that row's place in the batch.
    token = torch.arange(tokens, device=decisions.device).repeat(2, 1)
    shift = torch.nn.functional.pad(cu_seqlens[:-1] - (ends - kept), (0, 1))
    index = token + shift.gather(1, torch.searchsorted(ends, token, right=True))
    return torch.where(token < total, index, -1), cu_visits, numbers.contiguous()


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    check_rows(x, index)
    _check_positions(x, index)
    if x.shape[0] == 0:
        return x.new_zeros(index.shape[0], x.shape[1])
    none = index == -1
    return x.index_select(0, index.masked_fill(none, 0)).contiguous().masked_fill_(none[:, None], 0)


def scatter_rows(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    check_rows(x, index, y)
    _check_positions(x, index, unique=True)
    out, to = _with_spare_row(x, index)
    return out.index_copy_(0, to, y)[: x.shape[0]]


def scatter_add_rows(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    check_added(x, index, y)
    _check_positions(x, index, unique=True)
    out, to = _with_spare_row(x, index)
    return out.index_add_(0, to, y)[: x.shape[0]]


def gather_rms_norm(x: Tensor, index: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check_normed(x, index, weight, eps)
    gathered = gather_rows(x, index)
    normed = weight * unit_rms(gathered, eps)[0].to(x.dtype)
    return gathered, normed.masked_fill_((index == -1)[:, None], 0)


def unit_rms(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, d] over the root mean square of each row, and one over that [T, 1]; in float32, or float64 where x is."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(x.square().mean(1, keepdim=True) + eps)
    return x * scale, scale


def spare_last(index: Tensor, rows: int) -> Tensor:
    """index with -1 as the number of the row behind the last."""
    return index.masked_fill(index == -1, rows)


def _with_spare_row(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of x with one row more, and the index that writes there what has no row: without a wait for the device."""
    out = x.new_zeros(x.shape[0] + 1, x.shape[1])
    out[:-1] = x
    return out, spare_last(index, x.shape[0])


def _check_decisions(decisions: Tensor, cu_seqlens: Tensor) -> None:
    if decisions.dtype != torch.int8:
        raise TypeError(f"decisions must be int8, got {decisions.dtype}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if decisions.ndim != 1 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] != decisions.shape[0] + 1:
        raise ValueError(
            f"decisions must be [B] and cu_seqlens [B + 1], got {list(decisions.shape)} and {list(cu_seqlens.shape)}"
        )
    if decisions.device != cu_seqlens.device:
        raise ValueError(f"decisions is on {decisions.device}, cu_seqlens on {cu_seqlens.device}; move one of them")


def _check_float(x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be {', '.join(str(dtype).removeprefix('torch.') for dtype in FLOATS)}, got {x.dtype}")


def _check_offsets(cu_seqlens: Tensor, tokens: int | None = None) -> None:
    if not cu_seqlens.is_cpu:
        return
    if cu_seqlens[0] != 0 or (cu_seqlens[1:] < cu_seqlens[:-1]).any():
        raise ValueError(f"cu_seqlens must start at 0 and must not fall, got {cu_seqlens.tolist()}")
    if tokens is not None and tokens < cu_seqlens[-1]:
        raise ValueError(f"tokens must be at least cu_seqlens[-1], got {tokens} and {int(cu_seqlens[-1])}")


def _check_positions(x: Tensor, index: Tensor, unique: bool = False) -> None:
    if not index.is_cpu or not index.numel():
        return
    low, high = (int(end) for end in index.aminmax())
    if low < -1 or high >= x.shape[0]:
        raise ValueError(f"index must be from 0 to {x.shape[0] - 1}, or -1 for no row, got {low} to {high}")
    named = index[index >= 0]
    if unique and x.new_zeros(x.shape[0], dtype=torch.bool).index_fill(0, named, True).sum() != named.shape[0]:
        raise ValueError("index must not name a row twice")
