"""torch's own `varlen_attn` (FlashAttention), for the part of `ragged_attention` that it computes too: rows of new
tokens alone, packed without gaps, keys like queries.

    out[j] = sum_{k <= j, k > j - window} softmax_k(scale q_j . k_k) values[k]      within a row

What it takes has grown with torch, so its signature is asked: causal attention is `is_causal` up to 2.10 or so and
`window_size` later; `scale` and `enable_gqa` came in between. Oracle: `drllm_fast.attention_reference`.
"""

import inspect
from functools import cache

import torch
from torch import Tensor


@cache
def parameters() -> frozenset[str]:
    """Names of what varlen_attn takes; empty where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def offers(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    max_query: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> bool:
    """Whether varlen_attn computes this: query [T, H, D], keys [H_kv, N, D], values [H_kv, N, D_v], rows of at most
    max_query tokens."""
    takes, dim = parameters(), query.shape[2]
    windowed = window is not None and window < max_query
    if softcap is not None or sinks is not None or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if dim % 8 or dim > 256 or values.shape[2] != dim or not query.numel():
        return False
    if not all(map(_aligned, (query, keys, values))) or (query.is_cuda and not _has_flash_attention(query.device)):
        return False
    return (
        ("window_size" in takes or ("is_causal" in takes and not windowed))
        and ("enable_gqa" in takes or query.shape[1] == keys.shape[0])
        and ("scale" in takes or scale == dim**-0.5)
    )


def packed_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    max_query: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """What `offers` has said yes to: [T, H, D_v]."""
    from torch.nn.attention.varlen import varlen_attn

    takes, given = parameters(), {}
    if "window_size" in takes:  # how many keys before and after itself a query sees; -1 for all
        given["window_size"] = (-1 if window is None or window >= max_query else window - 1, 0)
    else:
        given["is_causal"] = True
    if "enable_gqa" in takes:
        given["enable_gqa"] = query.shape[1] != keys.shape[0]
    if "scale" in takes:
        given["scale"] = scale
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)
    return varlen_attn(query, keys, values, cu_seqlens, cu_seqlens, max_query, max_query, **given).contiguous()


def _aligned(t: Tensor) -> bool:
    """FlashAttention reads 16 bytes at a time."""
    return t.stride(2) == 1 and not any(n % 8 for n in (*t.stride()[:2], t.storage_offset()))


def _has_flash_attention(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)
