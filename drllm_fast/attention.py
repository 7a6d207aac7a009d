"""Attention over packed rows, under a name of our own in Hugging Face's `AttentionInterface`.

No mask is ever built: each row attends causally to its own keys. `ragged_attention` is the specification in PyTorch;
scaled_dot_product_attention does the work wherever it can, row by row.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from drllm_fast.active import ACTIVE

PREFIX = "drllm_fast_"

# The shape of the mask that stands for none: 4D, so that it is passed on as it is and no time goes into making one.
NO_MASK = (1, 1, 1, 1)

# Keyword arguments that attention functions may be given and that change nothing here.
HARMLESS = frozenset(
    {"output_attentions", "output_hidden_states", "output_router_logits", "position_ids", "use_cache"}
    | {"past_key_values", "layer_past", "return_dict", "num_items_in_batch", "cache_position", "position_embeddings"}
    | {"logits_to_keep"}
)


def register(original: str) -> str:
    """Register routed attention over `original` ("sdpa", "eager", ...) and return its name.

    Outside a routed forward the name means `original`, masks included: a model that shares the config with a routed
    one, or a routed model that is switched off, computes what it always did.
    """
    name = PREFIX + original
    if name in ALL_ATTENTION_FUNCTIONS:
        return name

    def routed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
        forward = ACTIVE.get()
        if forward is None:
            return _original(original, module)(module, query, key, value, attention_mask, **kwargs)
        if attention_mask is not None and attention_mask.shape != NO_MASK:
            raise NotImplementedError(
                f"{type(module).__name__} makes a mask of its own, which dynamic routing does not support; call "
                "model.disable_dynamic_routing()"
            )
        return forward_attention(forward, module, query, key, value, **kwargs), None

    AttentionInterface.register(name, routed_attention)
    if original in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def _original(name: str, module: nn.Module):
    if name == "eager":  # not in the interface: each modelling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def forward_attention(
    forward,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> Tensor:
    """Attention of the visit that is running; query [1, H, T', D], the keys and values from the visit's KV slot."""
    if unknown := [name for name in kwargs.keys() - HARMLESS if kwargs[name] is not None]:
        raise NotImplementedError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, which dynamic routing does not "
            "support; run this model inside `with model.routing.disabled():`"
        )
    if is_causal is False:
        raise NotImplementedError("is_causal=False: a routed model attends causally; use `model.routing.disabled()`")
    visit = forward.visit
    visit.attended = True
    new, past, slot = visit.rows.lengths, visit.past, visit.slot
    if slot is None:  # no cache: the keys are those of this forward
        starts, total = visit.offsets(), new
    else:
        if key is not visit.keys or value is not visit.values:
            raise NotImplementedError(
                f"{type(module).__name__} changes keys or values between the cache and the attention, which dynamic "
                "routing does not support; run this model inside `with model.routing.disabled():`"
            )
        key, value, starts = slot.keys, slot.values, slot.starts
        total = [p + n - f for p, n, f in zip(past, new, slot.first, strict=True)]
    return ragged_attention(
        query, key, value, new, starts, total,
        scale=scaling, dropout=dropout, window=sliding_window, softcap=softcap, sinks=s_aux,
    )  # fmt: skip


def ragged_attention(
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
