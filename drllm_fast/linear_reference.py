"""Formula of `pack_linear` and `packed_linear`: y = x W^T + b with W [N, K] in panels of C of its rows.

    panels[p, k, c] = W[p C + c, k], zeros from N on;  y[t, n] = b[n] + sum_k x[t, k] panels[n // C, k, n % C]

Accumulated in fp32, rounded once to the dtype of x. The kernels choose C; here all of W is one panel.
"""

from __future__ import annotations

from torch import Tensor


def check_weight(weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating, got {weight.dtype}")
    if weight.ndim != 2:
        raise ValueError(f"weight must be [N, K], got {list(weight.shape)}")


def check_packed(x: Tensor, panels: Tensor, bias: Tensor | None, features: int) -> None:
    if x.dtype != panels.dtype or not x.is_floating_point():
        raise TypeError(f"x and panels must have one floating dtype, got {x.dtype} and {panels.dtype}")
    if x.ndim != 2 or panels.ndim != 3:
        raise ValueError(f"x must be [T, K] and panels [P, K, C], got {list(x.shape)} and {list(panels.shape)}")
    if panels.shape[1] != x.shape[1]:
        raise ValueError(f"x has {x.shape[1]} columns, panels were packed for {panels.shape[1]}")
    count, columns = panels.shape[0], panels.shape[2]
    if features < 0 or count != (-(-features // columns) if columns else 0):
        raise ValueError(f"features must be what weight had, got {features} for {count} panels of {columns}")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias must be floating, got {bias.dtype}")
    if bias is not None and bias.shape != (features,):
        raise ValueError(f"bias must be [{features}], got {list(bias.shape)}")


def pack_linear(weight: Tensor) -> Tensor:
    check_weight(weight)
    if not len(weight):
        return weight.new_empty(0, weight.shape[1], 1)
    return weight.t().contiguous().unsqueeze(0)


def packed_linear(x: Tensor, panels: Tensor, bias: Tensor | None, features: int) -> Tensor:
    check_packed(x, panels, bias, features)
    weight = panels.permute(0, 2, 1).flatten(0, 1)[:features]
    out = x.float() @ weight.float().T
    return (out if bias is None else out + bias.float()).to(x.dtype)
