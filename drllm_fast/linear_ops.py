"""The ops that multiply by weights packed beforehand. Formulae: `drllm_fast.linear_reference`; kernels:
csrc/cpu/linear.cpp."""

import torch
from torch import Tensor
from torch.library import get_ctx, register_fake

from drllm_fast import linear_reference
from drllm_fast.linear_reference import check_packed, check_weight
from drllm_fast.registration import check, define_op


def pack_linear(weight: Tensor) -> Tensor:
    """The weight [N, K] of a linear layer as panels [P, K, C], which `packed_linear` takes; C is the machine's.

    Not to be stored: another machine may have another C. Raises TypeError or ValueError.
    """
    check(check_weight, weight)
    return torch.ops.drllm_fast.pack_linear(weight)


def packed_linear(x: Tensor, panels: Tensor, bias: Tensor | None = None, *, features: int) -> Tensor:
    """x [T, K] times the weight [features, K] that `pack_linear` made panels of, plus bias [features]: [T, features].

    Like torch.nn.functional.linear, float32 and bfloat16 on the CPU, and there bit for bit the same for a row of x
    whatever other rows there are. Not differentiable. Raises TypeError or ValueError.
    """
    check(check_packed, x, panels, bias, features)
    return torch.ops.drllm_fast.packed_linear(x, panels, bias, features)


define_op("pack_linear", "(Tensor weight) -> Tensor", linear_reference.pack_linear)
define_op(
    "packed_linear",
    "(Tensor x, Tensor panels, Tensor? bias, SymInt features) -> Tensor",
    linear_reference.packed_linear,
)


@register_fake("drllm_fast::pack_linear")
def _(weight):
    context = get_ctx()
    return weight.new_empty(context.new_dynamic_size(min=0), weight.shape[1], context.new_dynamic_size(min=1))


@register_fake("drllm_fast::packed_linear")
def _(x, panels, bias, features):
    return x.new_empty(x.shape[0], features)
