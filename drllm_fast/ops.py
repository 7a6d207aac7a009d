"""The ops: their schemas, what they refuse, their gradients, and which implementation runs.

Each op `drllm_fast::name` is defined here and only here. Its reference implementation runs on any device
(CompositeExplicitAutograd); importing a compiled extension puts a kernel in front of it: `drllm_fast._C` on the CPU,
`drllm_fast._C_cuda` on CUDA. A kernel in Python is registered the same way: `torch.library.impl(name, "CUDA", ...)`.
"""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.library import define, get_ctx, impl, register_autograd, register_fake

from drllm_fast import attention_reference, router_reference, rows_reference
from drllm_fast.attention_reference import check_attention
from drllm_fast.router_reference import check_router, check_router_windows
from drllm_fast.rows_reference import (
    check_active,
    check_added,
    check_normed,
    check_rows,
    check_visits,
    spare_last,
    unit_rms,
)

EXTENSION_ERROR: ImportError | None = None  # why drllm_fast._C is not loaded; None when it is
CUDA_EXTENSION_ERROR: ImportError | None = None  # the same for drllm_fast._C_cuda
# Which ops have a Triton kernel, and why it is not registered; None when it is.
TRITON_OPS = ("router",)
NO_TRITON = (
    "torch is CPU only"
    if torch.version.cuda is None
    else "triton is not installed"
    if find_spec("triton") is None
    else None
)


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


def visit_rows(decisions: Tensor, cu_seqlens: Tensor, *, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of both visits of a block, in buffers whose sizes the decisions do not change: a graph can hold them.

    decisions   int8 [B], how often each row runs the block
    cu_seqlens  int32 [B + 1], where each row's tokens begin in the packed batch, from 0
    tokens      the size of the buffers, at least cu_seqlens[-1]

    Returns, with [0] for the rows that run the block at least once and [1] for those that run it twice:
    index      int64 [2, tokens], the positions of those tokens in order, then -1
    cu_visits  int32 [2, B + 1], the cu_seqlens of those rows alone, then their last entry again
    rows       int32 [2, B], the numbers of those rows, then -1
    Nothing waits for the device. Raises TypeError or ValueError; only on the CPU for what the tensors hold.
    """
    _check(check_visits, decisions, cu_seqlens, tokens)
    return torch.ops.drllm_fast.visit_rows(decisions, cu_seqlens, tokens)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [T, d], index int64 [T'] -> [T', d], contiguous. Zeros where index is -1.

    Differentiable in x. Raises TypeError or ValueError.
    """
    _check(check_rows, x, index)
    return torch.ops.drllm_fast.gather_rows(x, index)


def scatter_rows(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    """A copy of x [T, d] in which the rows index int64 [T'] are those of y [T', d]. Where index is -1, y is not used.

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

    The formula is in `drllm_fast.router_reference`, which is also what runs for fp64; a row without tokens has the
    logits -cost. Everything is accumulated in fp32. Differentiable in the floating arguments. Raises TypeError or
    ValueError.
    """
    cost = torch.zeros_like(b2) if cost is None else cost
    arguments = (x, cu_seqlens, w1, b1, w2, b2, cost, windows)
    _check(check_router, *arguments)
    if x.dtype == torch.float64:
        return router_reference.router(*arguments)
    return torch.ops.drllm_fast.router(*arguments)


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

    The formula is in `drllm_fast.attention_reference`, which is what runs where there is no kernel: where gradients are
    asked for, without the extension, for fp64 everywhere and for fp16 on the CPU.
    Raises TypeError or ValueError.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    arguments = (query, keys, values, cu_seqlens, starts, lengths, max_query, max_length, scale, window, softcap, sinks)
    _check(check_attention, *arguments)
    if attention_has_kernel(query, keys, values, sinks):
        return torch.ops.drllm_fast.ragged_attention(*arguments, packed)
    return attention_reference.ragged_attention(*arguments)


def attention_has_kernel(query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None = None) -> bool:
    """Whether the op `ragged_attention` may be called with these: kernels have no gradients, and not every dtype."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, keys, values, sinks)):
        return False
    if query.is_cpu:
        return EXTENSION_ERROR is None and query.dtype in (torch.float32, torch.bfloat16)
    return query.dtype != torch.float64


def scatter_add_rows(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    """A copy of x [T, d] with y [T', d] added to the rows index int64 [T']. Where index is -1, y is not used.

    x is float32, bfloat16, float16 or float64. No row may be named twice. Differentiable in x and y. Raises TypeError
    or ValueError.
    """
    _check(check_added, x, index, y)
    return torch.ops.drllm_fast.scatter_add_rows(x, index, y)


def gather_rms_norm(x: Tensor, index: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """The rows index int64 [T'] of x [T, d], and their RMS norm with weight [d]: both [T', d], zeros where index is -1.

    As Hugging Face's LlamaRMSNorm: normed in float32, rounded to the dtype of x (float32, bfloat16, float16; float64
    stays that), then times weight, which has that dtype too. Differentiable in x and weight. Raises TypeError or
    ValueError.
    """
    _check(check_normed, x, index, weight, eps)
    return torch.ops.drllm_fast.gather_rms_norm(x, index, weight, eps)


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
    "visit_rows": "(Tensor decisions, Tensor cu_seqlens, SymInt tokens) -> (Tensor, Tensor, Tensor)",
    "gather_rows": "(Tensor x, Tensor index) -> Tensor",
    "scatter_rows": "(Tensor x, Tensor index, Tensor y) -> Tensor",
    "scatter_add_rows": "(Tensor x, Tensor index, Tensor y) -> Tensor",
    "gather_rms_norm": "(Tensor x, Tensor index, Tensor weight, float eps) -> (Tensor, Tensor)",
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
def _(query, keys, values, cu_seqlens, starts, lengths, max_query, max_length, scale, window, softcap, sinks, packed):
    return query.new_empty(*query.shape[:2], values.shape[2])


@register_fake("drllm_fast::active_tokens")
def _(decisions, cu_seqlens, at_least):
    torch._check(cu_seqlens.shape[0] == decisions.shape[0] + 1)
    tokens, ends = get_ctx().new_dynamic_size(), get_ctx().new_dynamic_size(min=1)
    return decisions.new_empty(tokens, dtype=torch.int64), cu_seqlens.new_empty(ends)


@register_fake("drllm_fast::visit_rows")
def _(decisions, cu_seqlens, tokens):
    rows = decisions.shape[0]
    torch._check(cu_seqlens.shape[0] == rows + 1)
    index = decisions.new_empty(2, tokens, dtype=torch.int64)
    return index, cu_seqlens.new_empty(2, rows + 1), cu_seqlens.new_empty(2, rows)


@register_fake("drllm_fast::gather_rows")
def _(x, index):
    return x.new_empty(index.shape[0], x.shape[1])


@register_fake("drllm_fast::scatter_rows")
@register_fake("drllm_fast::scatter_add_rows")
def _(x, index, y):
    torch._check(y.shape[0] == index.shape[0])
    torch._check(y.shape[1] == x.shape[1])
    return x.new_empty(x.shape)


@register_fake("drllm_fast::gather_rms_norm")
def _(x, index, weight, eps):
    torch._check(weight.shape[0] == x.shape[1])
    gathered = x.new_empty(index.shape[0], x.shape[1])
    return gathered, torch.empty_like(gathered)


def _sum_into_rows(rows, index, grad):
    """The gradient of x [rows, d] where grad is that of x[index]."""
    return grad.new_zeros(rows + 1, grad.shape[1]).index_add(0, spare_last(index, rows), grad)[:rows]


def _gather_setup(ctx, inputs, output):
    x, index = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(index)


def _gather_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return _sum_into_rows(ctx.rows, index, grad), None


def _scatter_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    grad_x = grad_y = None
    if ctx.needs_input_grad[0]:
        zeros = grad.new_zeros(1, grad.shape[1]).expand(index.shape[0], -1)
        grad_x = torch.ops.drllm_fast.scatter_rows(grad, index, zeros)
    if ctx.needs_input_grad[2]:
        grad_y = torch.ops.drllm_fast.gather_rows(grad, index)
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


def _scatter_add_backward(ctx, grad):
    (index,) = ctx.saved_tensors
    return grad, None, torch.ops.drllm_fast.gather_rows(grad, index) if ctx.needs_input_grad[2] else None


def _norm_setup(ctx, inputs, output):
    x, index, weight, ctx.eps = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(index, weight, output[0])


def _norm_backward(ctx, grad_gathered, grad_normed):
    """With u = g * s, s = (mean(g^2) + eps)^-1/2 and v the gradient of u: that of g is s * (v - u * mean(u * v))."""
    index, weight, gathered = ctx.saved_tensors
    unit, scale = unit_rms(gathered, ctx.eps)
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_unit = (grad_normed * weight).to(unit.dtype)
        grad = scale * (grad_unit - unit * (grad_unit * unit).mean(1, keepdim=True))
        grad_x = _sum_into_rows(ctx.rows, index, grad_gathered + grad.to(gathered.dtype))
    if ctx.needs_input_grad[2]:
        grad_weight = (grad_normed * unit.to(gathered.dtype)).sum(0)
    return grad_x, None, grad_weight, None


register_autograd("drllm_fast::gather_rows", _gather_backward, setup_context=_gather_setup)
register_autograd("drllm_fast::scatter_rows", _scatter_backward, setup_context=_scatter_setup)
register_autograd("drllm_fast::scatter_add_rows", _scatter_add_backward, setup_context=_scatter_setup)
register_autograd("drllm_fast::gather_rms_norm", _norm_backward, setup_context=_norm_setup)


def _router_cuda(x, cu_seqlens, w1, b1, w2, b2, cost, windows):
    from drllm_fast import router_kernel  # on the first call: importing Triton takes a second

    # What the kernel does not take, fp64 and routers wider than 1024 in the main, is the reference's.
    module = router_kernel if router_kernel.supports(x, w1, b1, w2, b2, cost) else router_reference
    return module.router(x, cu_seqlens, w1, b1, w2, b2, cost, windows)


# router_windows has no kernel: on training batches it is one large matrix product, which is cuBLAS's, between passes
# over [L, B, windows, h], a few per cent (h / d) of the `pooled` that the product reads. Nothing is left to fuse.
if NO_TRITON is None:
    impl("drllm_fast::router", "CUDA", _router_cuda)

try:
    import drllm_fast._C  # noqa: F401  registers the CPU kernels
except ImportError as error:
    EXTENSION_ERROR = error
try:
    if torch.version.cuda is None:  # what it links to is not there
        raise ImportError("this torch is built for the CPU only", name="drllm_fast._C_cuda")
    import drllm_fast._C_cuda  # noqa: F401  registers the CUDA kernels
except ImportError as error:
    CUDA_EXTENSION_ERROR = error
