"""The ops: their schemas, what they refuse, their gradients, and which implementation runs.

Each op `drllm_fast::name` is defined here and only here. Its reference implementation runs on any device
(CompositeExplicitAutograd); importing the compiled extension puts a C++ kernel in front of it on the CPU. A kernel for
another device is registered the same way: `torch.library.impl("drllm_fast::name", "CUDA", ...)`.
"""

import torch
from torch import Tensor
from torch.library import define, get_ctx, impl, register_autograd, register_fake

from drllm_fast import rows_reference
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


def _check(check, *arguments) -> None:
    if not torch.compiler.is_compiling():  # sizes may be unknown there; the fakes below say what must hold
        check(*arguments)


for _name, _schema in {
    "active_tokens": "(Tensor decisions, Tensor cu_seqlens, int at_least) -> (Tensor, Tensor)",
    "gather_rows": "(Tensor x, Tensor index) -> Tensor",
    "scatter_rows": "(Tensor x, Tensor index, Tensor y) -> Tensor",
}.items():
    define(f"drllm_fast::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    impl(f"drllm_fast::{_name}", "CompositeExplicitAutograd", getattr(rows_reference, _name))


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


register_autograd("drllm_fast::gather_rows", _gather_backward, setup_context=_gather_setup)
register_autograd("drllm_fast::scatter_rows", _scatter_backward, setup_context=_scatter_setup)

try:
    import drllm_fast._C  # noqa: F401  registers the CPU kernels
except ImportError as error:
    EXTENSION_ERROR = error
