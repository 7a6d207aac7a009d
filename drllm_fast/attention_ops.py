"""The op `ragged_attention`. Formula: `drllm_fast.attention_reference`; kernels: csrc/cpu/attention.cpp,
`drllm_fast.attention_kernel`, and torch's own where it serves (`drllm_fast.varlen`)."""

import torch
from torch import Tensor
from torch.library import register_fake

from drllm_fast import attention_reference, registration
from drllm_fast.attention_reference import check_attention
from drllm_fast.registration import check, define_op, triton_kernel


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    max_query: int,
    max_length: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    packed: bool = False,
) -> Tensor:
    """Causal attention of packed rows over keys that lie in the segments of a KV slot: [T, H, D_v], contiguous.

    query [T, H, D]; keys [H_kv, N, D]; values [H_kv, N, D_v]; H a multiple of H_kv, all of one floating dtype
    cu_seqlens  int32 [R + 1]: row i asks with query[cu_seqlens[i] : cu_seqlens[i + 1]], its n_i newest tokens
    starts      int32 [R], where the row's keys begin in N
    lengths     int32 [R], how many keys it has, those of its newest tokens included; n_i <= lengths[i] unless n_i is 0
    max_query   at least the largest n_i;  max_length at least the largest of `lengths`
    scale       of the scores, D ** -0.5 by default
    window      how many keys a query sees at most, itself included
    softcap     c turns a score s into c tanh(s / c)
    sinks       floating [H]: one score a head that takes part in the softmax and has no value
    packed      the caller's word that every row's keys are those of its queries, where its queries lie: starts equal
                cu_seqlens[:-1] and lengths the n_i. It changes nothing but which implementation may run

    The formula is in `drllm_fast.attention_reference`, which is what runs where there is no kernel: where gradients are
    asked for (then it cannot be compiled with fullgraph=True), under autocast, without the extension, for fp64
    everywhere and for fp16 on the CPU.
    Raises TypeError or ValueError.
    """
    for given in (query, keys, values, cu_seqlens, starts, lengths, *([] if sinks is None else [sinks])):
        if not isinstance(given, Tensor):
            raise TypeError(f"all but the options must be tensors, got {given!r:.80}")
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.ndim and query.shape[-1] else 1.0
    arguments = (query, keys, values, cu_seqlens, starts, lengths, max_query, max_length, scale, window, softcap, sinks)
    if not attention_has_kernel(query, keys, values, sinks):
        check(check_attention, *arguments)
        return attention_reference.ragged_attention(*arguments, packed)
    on_cpu = registration.cpu_kernels and all(t.is_cpu for t in (query, keys, sinks) if t is not None)
    if on_cpu and not torch.compiler.is_compiling():
        try:
            return torch.ops.drllm_fast.ragged_attention(*arguments, packed)
        except (RuntimeError, ValueError) as refused:  # by the kernel, which checks for itself: twice takes longer
            error = refused
        check_attention(*arguments)
        raise error
    check(check_attention, *arguments)
    return torch.ops.drllm_fast.ragged_attention(*arguments, packed)


def attention_has_kernel(query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None = None) -> bool:
    """Whether the op `ragged_attention` may be called with these: kernels have no gradients, take one dtype of a few,
    and know nothing of autocast, which casts what goes into torch's own attention."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, keys, values, sinks)):
        return False
    if not query.dtype == keys.dtype == values.dtype or torch.is_autocast_enabled(query.device.type):
        return False
    if query.is_cpu:
        return query.dtype in (torch.float32, torch.bfloat16)
    return query.dtype != torch.float64


define_op(
    "ragged_attention",
    "(Tensor query, Tensor keys, Tensor values, Tensor cu_seqlens, Tensor starts, Tensor lengths, SymInt max_query, "
    "SymInt max_length, float scale, int? window, float? softcap, Tensor? sinks, bool packed=False) -> Tensor",
    attention_reference.ragged_attention,
)


@register_fake("drllm_fast::ragged_attention")
def _(
    query, keys, values, cu_seqlens, starts, lengths, max_query, max_length, scale, window, softcap, sinks, packed=False
):
    for other in (keys, values, cu_seqlens, starts, lengths):
        torch._check(other.device == query.device)
    torch._check(keys.shape[2] == query.shape[2])
    torch._check(values.shape[0] == keys.shape[0])
    torch._check(values.shape[1] == keys.shape[1])
    torch._check(cu_seqlens.shape[0] == starts.shape[0] + 1)
    torch._check(lengths.shape[0] == starts.shape[0])
    return query.new_empty(*query.shape[:2], values.shape[2])


def ragged_attention_cuda(
    query, keys, values, cu_seqlens, starts, lengths, max_query, max_length, scale, window, softcap, sinks, packed=False
):  # fmt: skip
    """torch's own varlen_attn where it offers exactly this, else Triton; float64, which no kernel takes, by the
    reference, which waits for the device."""
    from drllm_fast import attention_kernel, varlen

    layout = (cu_seqlens, starts, lengths, max_query, max_length)
    check_attention(query, keys, values, *layout, scale, window, softcap, sinks)
    if query.dtype == torch.float64:
        return attention_reference.ragged_attention(query, keys, values, *layout, scale, window, softcap, sinks, packed)
    if packed and varlen.offers(query, keys, values, max_query, scale, window, softcap, sinks):
        return varlen.packed_attention(query, keys, values, cu_seqlens, max_query, scale, window)
    return attention_kernel.ragged_attention(query, keys, values, *layout, scale, window, softcap, sinks)


triton_kernel("ragged_attention", ragged_attention_cuda)
