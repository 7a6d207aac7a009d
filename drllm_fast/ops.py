"""The ops: their schemas, what they refuse, their gradients, and which implementation runs.

Each op `drllm_fast::name` is defined here and only here. Its reference implementation runs on any device
(CompositeExplicitAutograd); importing the compiled extension puts a C++ kernel in front of it on the CPU. A kernel for
another device is registered the same way: `torch.library.impl("drllm_fast::name", "CUDA", ...)`.
"""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.library import define, get_ctx, impl, register_autograd, register_fake

from drllm_fast import attention_reference, router_reference, rows_reference
from drllm_fast.attention_reference import check_attention
from drllm_fast.router_reference import check_router, check_router_windows
from drllm_fast.rows_reference import check_active, check_rows

EXTENSION_ERROR: ImportError | None = None  # why drllm_fast._C is not loaded; None when it is


def active_tokens(decisions: Tensor, cu_seqlens: Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
    """The tokens of the rows that a visit runs.

    decisions   int8 [B], how often each row runs the block
    cu_seqlens  int32 [B + 1], where each row's tokens begin in the packed batch, from 0
    at_least    1 for the block's first visit, 2 for its second

    Returns index int64 [T'], the positions of those tokens in order, and the cu_seqlens int32 [B' + 1] of those rows
    alone. An active row without tokens counts as a row. Raises TypeError or ValueError.
    """
    _check(check_active, decisions, cu_seqlens, at_least)
    return torch.ops.drllm_fast.active_tokens(decisions, cu_seqlens, at_least)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [T, d], index int64 [T'] -> [T', d], contiguous. Differentiable in x. Raises TypeError or ValueError."""
    _check(check_rows, x, index)
    return torch.ops.drllm_fast.gather_rows(x, index)


def scatter_rows(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    """A copy of x [T, d] in which the rows index int64 [T'] are those of y [T', d].

    No row may be named twice. Differentiable in x and y. Raises TypeError or ValueError.
    """
    _check(check_rows, x, index, y)
    return torch.ops.drllm_fast.scatter_rows(x, index, y)


def router(
    x: Tensor,
    cu_seqlens: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    windows: int,
    cost: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One block's router for every row of a packed batch: logits fp32 [B, 3] and decisions int8 [B].

    x           fp32, bf16, fp16 or fp64 [T, d]
    cu_seqlens  int32 [B + 1], where each row's tokens begin and end in x
    w1 [h, d], b1 [h], w2 [3, h], b2 [3], floating
    windows     at least 1; a row of n tokens is pooled into min(windows, n)
    cost        floating [3] or None, subtracted from the logits: what each class costs, for a budget

    The formula is in `drllm_fast.router_reference`; a row without tokens has the logits -cost. Differentiable in the
    floating arguments. Raises TypeError or ValueError.
    """
    cost = torch.zeros_like(b2) if cost is None else cost
    _check(check_router, x, cu_seqlens, w1, b1, w2, b2, cost, windows)
    return torch.ops.drllm_fast.router(x, cu_seqlens, w1, b1, w2, b2, cost, windows)


def router_windows(pooled: Tensor, counts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The routers of all blocks at once, on windows that were pooled before: logits fp32 [L, B, 3], for training.

    pooled [L, B, windows, d] floating, counts integer [B]: how many windows each row uses, see `pool_windows`
    w1 [L, h, d], b1 [L, h], w2 [L, 3, h], b2 [L, 3], floating

    Rows with counts 0 get zeros. Differentiable in the floating arguments. Raises TypeError or ValueError.
    """
    _check(check_router_windows, pooled, counts, w1, b1, w2, b2)
    return torch.ops.drllm_fast.router_windows(pooled, counts, w1, b1, w2, b2)


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

    The formula is in `drllm_fast.attention_reference`. Where gradients are asked for, that reference runs.
    Raises TypeError or ValueError.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    arguments = (query, keys, values, cu_seqlens, starts, lengths, max_query, max_length, scale, window, softcap, sinks)
    _check(check_attention, *arguments)
    arguments += (packed,)
    differentiated = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (query, keys, values, sinks)
    )
    run = attention_reference.ragged_attention if differentiated else torch.ops.drllm_fast.ragged_attention
    return run(*arguments)


def _check(check, *arguments) -> None:
    if not torch.compiler.is_compiling():  # sizes may be unknown there; the fakes below say what must hold
        check(*arguments)


for _name, _schema in {
    "router": "(Tensor x, Tensor cu_seqlens, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor cost, int windows)"
    " -> (Tensor, Tensor)",
    "router_windows": "(Tensor pooled, Tensor counts, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> Tensor",
    "ragged_attention": "(Tensor query, Tensor keys, Tensor values, Tensor cu_seqlens, Tensor starts, Tensor lengths, "
    "SymInt max_query, SymInt max_length, float scale, int? window, float? softcap, Tensor? sinks, bool packed=False) "
    "-> Tensor",
    "active_tokens": "(Tensor decisions, Tensor cu_seqlens, int at_least) -> (Tensor, Tensor)",
    "gather_rows": "(Tensor x, Tensor index) -> Tensor",
    "scatter_rows": "(Tensor x, Tensor index, Tensor y) -> Tensor",
}.items():
    define(f"drllm_fast::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    _module = {"router": router_reference, "ragged": attention_reference}.get(_name.split("_")[0], rows_reference)
    impl(f"drllm_fast::{_name}", "CompositeExplicitAutograd", getattr(_module, _name))


def ragged_attention_cuda(
    query, keys, values, cu_seqlens, starts, lengths, max_query, max_length, scale, window, softcap, sinks, packed=False
):  # fmt: skip
    """torch's own varlen_attn where it offers exactly this, else Triton; float64, which no kernel takes, by the
    reference, which waits for the device."""
    from drllm_fast import attention_kernel, varlen

    layout = (cu_seqlens, starts, lengths, max_query, max_length)
    if query.dtype == torch.float64:
        return attention_reference.ragged_attention(query, keys, values, *layout, scale, window, softcap, sinks, packed)
    if packed and varlen.offers(query, keys, values, max_query, scale, window, softcap, sinks):
        return varlen.packed_attention(query, keys, values, cu_seqlens, max_query, scale, window)
    return attention_kernel.ragged_attention(query, keys, values, *layout, scale, window, softcap, sinks)


if torch.version.cuda is not None and find_spec("triton") is not None:
    impl("drllm_fast::ragged_attention", "CUDA", ragged_attention_cuda)


@register_fake("drllm_fast::router")
def _(x, cu_seqlens, w1, b1, w2, b2, cost, windows):
    rows = cu_seqlens.shape[0] - 1
    return x.new_empty(rows, 3, dtype=torch.float32), x.new_empty(rows, dtype=torch.int8)


@register_fake("drllm_fast::router_windows")
def _(pooled, counts, w1, b1, w2, b2):
    return pooled.new_empty(*pooled.shape[:2], 3, dtype=torch.float32)


@register_fake("drllm_fast::ragged_attention")
def _(
    query, keys, values, cu_seqlens, starts, lengths, max_query, max_length, scale, window, softcap, sinks, packed=False
):
    return query.new_empty(*query.shape[:2], values.shape[2])


@register_fake("drllm_fast::active_tokens")
def _(decisions, cu_seqlens, at_least):
    torch._check(cu_seqlens.shape[0] == decisions.shape[0] + 1)
    tokens, ends = get_ctx().new_dynamic_size(), get_ctx().new_dynamic_size(min=1)
    return decisions.new_empty(tokens, dtype=torch.int64), cu_seqlens.new_empty(ends)


@register_fake("drllm_fast::gather_rows")
def _(x, index):
    return x.new_empty(index.shape[0], x.shape[1])


@register_fake("drllm_fast::scatter_rows")
def _(x, index, y):
    torch._check(y.shape[0] == index.shape[0])
    torch._check(y.shape[1] == x.shape[1])
    return x.new_empty(x.shape)


def _gather_setup(ctx, inputs, output):
    x, index = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(index)


def _gather_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return grad.new_zeros(ctx.rows, grad.shape[1]).index_add(0, index, grad), None


def _scatter_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    grad_x = grad.index_fill(0, index, 0) if ctx.needs_input_grad[0] else None
    grad_y = torch.ops.drllm_fast.gather_rows(grad, index) if ctx.needs_input_grad[2] else None
    return grad_x, None, grad_y


def _router_setup(ctx, inputs, output):
    *tensors, ctx.windows = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def _router_backward(ctx, grad, _):
    x, cu_seqlens, w1, b1, w2, b2, cost = ctx.saved_tensors
    inputs = (x, w1, b1, w2, b2)
    grads = router_reference.router_backward(grad, x, cu_seqlens, ctx.windows, *inputs[1:])
    grad_x, *grad_weights = (g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))
    return grad_x, None, *grad_weights, -grad.sum(0).to(cost.dtype), None


def _windows_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _windows_backward(ctx, grad):
    pooled, counts, *weights = ctx.saved_tensors
    grad_pooled, *grads = router_reference.router_gradients(grad, pooled, counts, *weights)
    return grad_pooled.to(pooled.dtype), None, *(g.to(t.dtype) for g, t in zip(grads, weights, strict=True))


register_autograd("drllm_fast::router", _router_backward, setup_context=_router_setup)
register_autograd("drllm_fast::router_windows", _windows_backward, setup_context=_windows_setup)
register_autograd("drllm_fast::gather_rows", _gather_backward, setup_context=_gather_setup)
register_autograd("drllm_fast::scatter_rows", _scatter_backward, setup_context=_scatter_setup)

try:
    import drllm_fast._C  # noqa: F401  registers the CPU kernels
except ImportError as error:
    EXTENSION_ERROR = error
