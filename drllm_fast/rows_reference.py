"""What the row ops compute, in plain torch: the specification of csrc/cpu/rows.cpp, and what runs where no kernel does.

    active_tokens  index = the positions of the tokens of every row b with decisions[b] >= at_least
    gather_rows    out[i] = x[index[i]]
    scatter_rows   out = x, except out[index[i]] = y[i]

On the CPU values are checked too. On other devices that would wait for the device, so there only shapes, dtypes and
devices are; torch's own indexing stops at a position out of range.
"""

import torch
from torch import Tensor

DECISIONS = range(0, 128)  # what `at_least` may be: the non-negative part of int8


def check_active(decisions: Tensor, cu_seqlens: Tensor, at_least: int) -> None:
    """Raises TypeError or ValueError unless decisions is int8 [B], cu_seqlens int32 [B + 1] on the same device."""
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
    if at_least not in DECISIONS:
        raise ValueError(f"at_least must be from {DECISIONS[0]} to {DECISIONS[-1]}, got {at_least}")


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


def active_tokens(decisions: Tensor, cu_seqlens: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    check_active(decisions, cu_seqlens, at_least)
    lengths = cu_seqlens.diff()
    if cu_seqlens.is_cpu and (cu_seqlens[0] != 0 or (lengths < 0).any()):
        raise ValueError(f"cu_seqlens must start at 0 and must not fall, got {cu_seqlens.tolist()}")
    active = decisions >= at_least
    index = active.repeat_interleave(lengths).nonzero().squeeze(1)
    kept = lengths[active]
    cu_active = cu_seqlens.new_zeros(kept.shape[0] + 1)
    torch.cumsum(kept, 0, dtype=torch.int32, out=cu_active[1:])
    return index, cu_active


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    check_rows(x, index)
    _check_positions(x, index)
    return x.index_select(0, index).contiguous()


def scatter_rows(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    check_rows(x, index, y)
    _check_positions(x, index)
    if index.is_cpu and x.new_zeros(x.shape[0], dtype=torch.bool).index_fill(0, index, True).sum() != index.shape[0]:
        raise ValueError("index must not name a row twice")
    return x.clone(memory_format=torch.contiguous_format).index_copy_(0, index, y)


def _check_positions(x: Tensor, index: Tensor) -> None:
    if index.is_cpu and index.numel():
        low, high = (int(end) for end in index.aminmax())
        if low < 0 or high >= x.shape[0]:
            raise ValueError(f"index must be from 0 to {x.shape[0] - 1}, got {low} to {high}")
