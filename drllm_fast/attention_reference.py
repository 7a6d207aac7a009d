"""Causal attention of packed rows over keys that lie in segments, in plain torch: the specification of
csrc/cpu/attention.cpp and attention_kernel.py, and what runs where they do not. scaled_dot_product_attention does the
work wherever it can, row by row. Differentiable.

Row i asks with its last n_i = cu_seqlens[i + 1] - cu_seqlens[i] tokens; its m_i = lengths[i] keys lie at starts[i]. The
j-th of its queries sees the keys k <= m_i - n_i + j, with a `window` only the last `window` of those.

    out[j] = sum_k softmax_k(s_jk) values[k]      s_jk = scale q_j . k_k, with a softcap c: c tanh(scale q_j . k_k / c)

`sinks` [H] adds one score a head that takes part in the softmax and has no value.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from drllm_fast.registration import check_integer


def check_attention(
    query, keys, values, cu_seqlens, starts, lengths, max_query, max_length, scale, window, softcap, sinks
) -> None:  # fmt: skip
    """Raises TypeError or ValueError unless the arguments of the op `ragged_attention` belong together. What lies in
    cu_seqlens, starts and lengths is checked on the CPU alone: elsewhere that would wait for the device."""
    floating = {"query": query, "keys": keys, "values": values}
    for name, tensor in floating.items():
        if not tensor.is_floating_point() or tensor.dtype != query.dtype:
            raise TypeError(f"query, keys and values must have one floating dtype, got {name} of {tensor.dtype}")
        if tensor.ndim != 3:
            raise ValueError(
                f"query must be [T, H, D], keys [H_kv, N, D], values [H_kv, N, D_v], got {name} {list(tensor.shape)}"
            )
    heads, dim, kv_heads = query.shape[1], query.shape[2], keys.shape[0]
    if keys.shape[2] != dim or values.shape[:2] != keys.shape[:2] or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            "query must be [T, H, D], keys [H_kv, N, D], values [H_kv, N, D_v] with H a multiple of H_kv, got "
            f"{list(query.shape)}, {list(keys.shape)}, {list(values.shape)}"
        )
    layout = {"cu_seqlens": cu_seqlens, "starts": starts, "lengths": lengths}
    for name, tensor in layout.items():
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {tensor.dtype}")
    rows = starts.shape[0] if starts.ndim == 1 else -1
    if cu_seqlens.shape != (rows + 1,) or lengths.shape != (rows,):
        raise ValueError(
            f"cu_seqlens must be [R + 1], starts and lengths [R], got {[list(t.shape) for t in layout.values()]}"
        )
    if sinks is not None and (not sinks.is_floating_point() or sinks.shape != (heads,)):
        raise ValueError(f"sinks must be floating [{heads}], got {sinks.dtype} {list(sinks.shape)}")
    for name, tensor in {**floating, **layout, "sinks": sinks}.items():
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"query is on {query.device}, {name} on {tensor.device}; move one of them")
    check_integer("max_query", max_query, 0)
    check_integer("max_length", max_length, 0)
    if window is not None:
        check_integer("window", window, 1)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def check_layout(
    tokens: int,
    size: int,
    cu_seqlens: list[int],
    starts: list[int],
    lengths: list[int],
    max_query: int,
    max_length: int,
) -> None:
    """ValueError unless every row's queries lie in T = `tokens`, its keys in N = `size`, and both are within bounds."""
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens:
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens of query, got {cu_seqlens}")
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        new = cu_seqlens[row + 1] - cu_seqlens[row]
        if new < 0:
            raise ValueError(f"cu_seqlens must not fall, got {cu_seqlens}")
        if start < 0 or length < 0 or start + length > size:
            raise ValueError(f"row {row} has keys {start} to {start + length}, there are {size}")
        if new > length:
            raise ValueError(f"row {row} asks with {new} tokens and has {length} keys; its own must be among them")
        if new > max_query or length > max_length:
            raise ValueError(
                f"row {row} asks with {new} tokens and has {length} keys; max_query is {max_query}, max_length "
                f"{max_length}"
            )


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
    packed: bool = False,
) -> Tensor:
    """query [T, H, D], keys [H_kv, N, D], values [H_kv, N, D_v] -> [T, H, D_v]; see `drllm_fast.ops`."""
    new, starts, lengths = cu_seqlens.diff().tolist(), starts.tolist(), lengths.tolist()
    check_layout(query.shape[0], keys.shape[1], cu_seqlens.tolist(), starts, lengths, max_query, max_length)
    if packed and (starts != cu_seqlens[:-1].tolist() or lengths != new):
        raise ValueError(
            f"packed=True needs starts to be cu_seqlens[:-1] and lengths the rows' tokens, got {starts}, {lengths}"
        )
    if not any(new) or not query.shape[1]:
        return query.new_zeros(*query.shape[:2], values.shape[2])
    out = attend_rows(
        query.transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), new, starts, lengths,
        scale=scale, window=window, softcap=softcap, sinks=sinks,
    )  # fmt: skip
    return out[0].contiguous()


def attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new: list[int],
    starts: list[int],
    total: list[int],
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed rows over keys that lie in segments.

    query [1, H, T, D]; keys [1, H_kv, N, D]; values [1, H_kv, N, D_v] -> [1, T, H, D_v].
    Row i asks with its new[i] last tokens; its total[i] keys lie at starts[i] of N. softmax(q k^T * scale + mask) v,
    a query sees itself and what comes before it, at most `window` tokens in all; with `softcap` c the scores are
    c * tanh(score / c); `sinks` [H] adds one score a head that takes part in the softmax and has no value.
    """
    if len(new) == 1:
        k, v = keys.narrow(2, starts[0], total[0]), values.narrow(2, starts[0], total[0])
        return _attend(query, k, v, scale, dropout, window, softcap, sinks)
    same = len(set(new)) == 1 and len(set(total)) == 1
    step = starts[1] - starts[0] if same else 0
    if same and step and all(b - a == step for a, b in zip(starts, starts[1:], strict=False)):
        # Equal rows at equal distances are an ordinary batch, seen through strides.
        q = query.unflatten(2, (len(new), new[0]))[0].transpose(0, 1)  # [R, H, n, D]
        k, v = (_segments(t, starts[0], step, len(new), total[0]) for t in (keys, values))
        return _attend(q, k, v, scale, dropout, window, softcap, sinks).flatten(0, 1).unsqueeze(0)
    parts, at = [], 0
    for n, start, length in zip(new, starts, total, strict=True):
        if n:
            q = query.narrow(2, at, n)
            k, v = keys.narrow(2, start, length), values.narrow(2, start, length)
            parts.append(_attend(q, k, v, scale, dropout, window, softcap, sinks))
        at += n
    return torch.cat(parts, dim=1)


def _segments(t: Tensor, start: int, step: int, rows: int, length: int) -> Tensor:
    """Segments of equal length at equal distances in [1, H, N, D], as a view [rows, H, length, D]."""
    _, heads, _, dim = t.shape
    _, head, token, one = t.stride()
    return t.as_strided(
        (rows, heads, length, dim), (step * token, head, token, one), t.storage_offset() + start * token
    )


def _attend(q, k, v, scale, dropout, window, softcap, sinks) -> Tensor:
    """One batch of equal rows: q [R, H, n, D], k and v [R, H_kv, m, D] with m >= n, the queries being the last n.
    -> [R, n, H, D_v]"""
    n, m = q.shape[2], k.shape[2]
    if window is not None and m > window + n - 1:  # nothing older is in sight
        k, v = (t.narrow(2, m - (window + n - 1), window + n - 1) for t in (k, v))
        m = window + n - 1
    windowed = window is not None and m > window
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    if softcap is None and sinks is None:
        if n == 1 and groups > 1:
            # The heads of a group ask the same keys: as queries of one head they take the fast kernel on a CPU
            # (2.4x at 64 keys, 6x at 1024 in bf16 against enable_gqa).
            packed = q.reshape(q.shape[0], kv_heads, groups, q.shape[3])
            out = F.scaled_dot_product_attention(packed, k, v, None, dropout, scale=scale)
            return out.reshape(q.shape[0], 1, q.shape[1], v.shape[3])
        plain = n == 1 or (n == m and not windowed)
        mask = None if plain else causal_mask(n, m, window, q.device)
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=plain and n > 1, scale=scale, enable_gqa=groups > 1
        ).transpose(1, 2)
    grouped = q.reshape(q.shape[0], kv_heads, groups * n, q.shape[3])
    scores = grouped @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.view(q.shape[0], q.shape[1], n, m)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if n > 1:
        scores = scores.masked_fill(~causal_mask(n, m, window, q.device), -torch.inf)
    scores = scores.float()
    if sinks is not None:
        sinks = sinks.float().view(1, -1, 1, 1).expand(q.shape[0], -1, n, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = F.dropout(scores.softmax(-1)[..., :m].to(v.dtype), dropout)
    out = weights.reshape(q.shape[0], kv_heads, groups * n, m) @ v
    return out.view(q.shape[0], q.shape[1], n, v.shape[3]).transpose(1, 2)


def causal_mask(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """bool [n, m], True where the i-th of the last n of m tokens may look."""
    distance = torch.arange(m - n, m, device=device).unsqueeze(1) - torch.arange(m, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
