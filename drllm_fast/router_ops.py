"""The ops `router` and `router_windows`. Formula: `drllm_fast.router_reference`; kernels: csrc/cpu/router.cpp and
`drllm_fast.router_kernel`."""

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from drllm_fast import registration, router_reference
from drllm_fast.registration import check, define_op, triton_kernel
from drllm_fast.router_reference import check_router, check_router_windows


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

    The formula is in `drllm_fast.router_reference`, which is also what runs for fp64, and on CUDA for fp64 weights and
    for h above 1024, where it waits for the device. A row without tokens has the logits -cost. Sums are fp32.
    Differentiable in the floating arguments. Raises TypeError or ValueError.
    """
    cost = torch.zeros_like(b2) if cost is None else cost
    arguments = (x, cu_seqlens, w1, b1, w2, b2, cost, windows)
    if (
        registration.cpu_kernels
        and x.is_cpu
        and w1.is_cpu
        and cost.is_cpu
        and x.dtype != torch.float64
        and not torch.compiler.is_compiling()
    ):
        try:
            return torch.ops.drllm_fast.router(*arguments)
        except (RuntimeError, ValueError) as refused:  # by the kernel, which checks for itself: twice takes longer
            error = refused
        check_router(*arguments)
        raise error
    check(check_router, *arguments)
    return (router_reference.router if x.dtype == torch.float64 else torch.ops.drllm_fast.router)(*arguments)


def router_windows(pooled: Tensor, counts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The routers of all blocks at once, on windows that were pooled before: logits fp32 [L, B, 3], for training.

    pooled [L, B, windows, d] floating, counts integer [B]: how many windows each row uses, see `pool_windows`
    w1 [L, h, d], b1 [L, h], w2 [L, 3, h], b2 [L, 3], floating

    Rows with counts 0 get zeros. Differentiable in the floating arguments. Raises TypeError or ValueError.
    """
    check(check_router_windows, pooled, counts, w1, b1, w2, b2)
    return torch.ops.drllm_fast.router_windows(pooled, counts, w1, b1, w2, b2)


define_op(
    "router",
    "(Tensor x, Tensor cu_seqlens, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor cost, int windows)"
    " -> (Tensor, Tensor)",
    router_reference.router,
)
# On training batches this is one large matrix product, which is the vendor's, between passes over [L, B, windows, h], a
# few per cent (h / d) of the `pooled` that the product reads. Nothing is left to fuse: it has no kernel.
define_op(
    "router_windows",
    "(Tensor pooled, Tensor counts, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> Tensor",
    router_reference.router_windows,
)


@register_fake("drllm_fast::router")
def _(x, cu_seqlens, w1, b1, w2, b2, cost, windows):
    h, d = w1.shape
    for other in (cu_seqlens, w1, b1, w2, b2, cost):
        torch._check(other.device == x.device)
    for shape, expected in (
        (x.shape[1:], (d,)),
        (b1.shape, (h,)),
        (w2.shape, (3, h)),
        (b2.shape, (3,)),
        (cost.shape, (3,)),
    ):
        torch._check(len(shape) == len(expected))
        for size, other in zip(shape, expected, strict=True):
            torch._check(size == other)
    rows = cu_seqlens.shape[0] - 1
    return x.new_empty(rows, 3, dtype=torch.float32), x.new_empty(rows, dtype=torch.int8)


@register_fake("drllm_fast::router_windows")
def _(pooled, counts, w1, b1, w2, b2):
    return pooled.new_empty(*pooled.shape[:2], 3, dtype=torch.float32)


def _router_setup(ctx, inputs, output):
    *tensors, ctx.windows = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def _router_backward(ctx, grad, _):
    x, cu_seqlens, w1, b1, w2, b2, cost = ctx.saved_tensors
    weights = (w1, b1, w2, b2)
    grad_x, *grads = router_reference.router_backward(
        grad, x, cu_seqlens, ctx.windows, *weights, of_x=ctx.needs_input_grad[0]
    )
    return _to(grad_x, x), None, *map(_to, grads, weights), -grad.sum(0).to(cost.dtype), None


def _windows_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _windows_backward(ctx, grad):
    pooled, counts, *weights = ctx.saved_tensors
    grad_pooled, *grads = router_reference.router_gradients(
        grad, pooled, counts, *weights, of_pooled=ctx.needs_input_grad[0]
    )
    return _to(grad_pooled, pooled), None, *map(_to, grads, weights)


def _to(grad, tensor):
    return None if grad is None else grad.to(tensor.dtype)


register_autograd("drllm_fast::router", _router_backward, setup_context=_router_setup)
register_autograd("drllm_fast::router_windows", _windows_backward, setup_context=_windows_setup)


def _router_cuda(x, cu_seqlens, w1, b1, w2, b2, cost, windows):
    from drllm_fast import router_kernel

    check_router(x, cu_seqlens, w1, b1, w2, b2, cost, windows)
    # What the kernel does not take, fp64 and routers wider than 1024 in the main, is the reference's.
    module = router_kernel if router_kernel.supports(x, w1, b1, w2, b2, cost) else router_reference
    return module.router(x, cu_seqlens, w1, b1, w2, b2, cost, windows)


triton_kernel("router", _router_cuda)
