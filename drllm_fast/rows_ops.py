"""The ops that move rows of a packed batch by routed layer path. Formulae: `drllm_fast.rows_reference`; kernels:
csrc/cpu/rows.cpp, csrc/cpu/fused_rows.cpp and csrc/cuda/rows.cu."""

import torch
from torch import Tensor
from torch.library import get_ctx, register_autograd, register_fake

from drllm_fast import rows_reference
from drllm_fast.registration import check, define_op
from drllm_fast.rows_reference import (
    check_active,
    check_added,
    check_normed,
    check_rows,
    check_visits,
    spare_last,
    unit_rms,
)


def active_tokens(decisions: Tensor, cu_seqlens: Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
    """The tokens of the rows that a visit runs.

    decisions   int8 [B], how often each row runs the block
    cu_seqlens  int32 [B + 1], where each row's tokens begin in the packed batch, from 0
    at_least    1 for the block's first visit, 2 for its second

    Returns index int64 [T'], the positions of those tokens in order, and the cu_seqlens int32 [B' + 1] of those rows
    alone. An active row without tokens counts as a row. Raises TypeError or ValueError.
    """
    check(check_active, decisions, cu_seqlens, at_least)
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
    check(check_visits, decisions, cu_seqlens, tokens)
    return torch.ops.drllm_fast.visit_rows(decisions, cu_seqlens, tokens)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [T, d], index int64 [T'] -> [T', d], contiguous. Zeros where index is -1.

    Differentiable in x. Raises TypeError or ValueError.
    """
    check(check_rows, x, index)
    return torch.ops.drllm_fast.gather_rows(x, index)


def scatter_rows(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    """A copy of x [T, d] in which the rows index int64 [T'] are those of y [T', d]. Where index is -1, y is not used.

    No row may be named twice. Differentiable in x and y. Raises TypeError or ValueError.
    """
    check(check_rows, x, index, y)
    return torch.ops.drllm_fast.scatter_rows(x, index, y)


def scatter_add_rows(x: Tensor, index: Tensor, y: Tensor) -> Tensor:
    """A copy of x [T, d] with y [T', d] added to the rows index int64 [T']. Where index is -1, y is not used.

    x is float32, bfloat16, float16 or float64. No row may be named twice. Differentiable in x and y. Raises TypeError
    or ValueError.
    """
    check(check_added, x, index, y)
    return torch.ops.drllm_fast.scatter_add_rows(x, index, y)


def gather_rms_norm(x: Tensor, index: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """The rows index int64 [T'] of x [T, d], and their RMS norm with weight [d]: both [T', d], zeros where index is -1.

    As Hugging Face's LlamaRMSNorm: normed in float32, rounded to the dtype of x (float32, bfloat16, float16; float64
    stays that), then times weight, which has that dtype too. Differentiable in x and weight. Raises TypeError or
    ValueError.
    """
    check(check_normed, x, index, weight, eps)
    return torch.ops.drllm_fast.gather_rms_norm(x, index, weight, eps)


for _name, _schema in {
    "active_tokens": "(Tensor decisions, Tensor cu_seqlens, int at_least) -> (Tensor, Tensor)",
    "visit_rows": "(Tensor decisions, Tensor cu_seqlens, SymInt tokens) -> (Tensor, Tensor, Tensor)",
    "gather_rows": "(Tensor x, Tensor index) -> Tensor",
    "scatter_rows": "(Tensor x, Tensor index, Tensor y) -> Tensor",
    "scatter_add_rows": "(Tensor x, Tensor index, Tensor y) -> Tensor",
    "gather_rms_norm": "(Tensor x, Tensor index, Tensor weight, float eps) -> (Tensor, Tensor)",
}.items():
    define_op(_name, _schema, getattr(rows_reference, _name))


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
