"""What the router computes, in plain torch: the specification of every faster router in this package.

    pool_windows   row b has n_b tokens; W_b = min(windows, n_b) windows of s_b = n_b // W_b tokens each
                   pooled[b, w] = mean of hidden[cu_seqlens[b] + w s_b : cu_seqlens[b] + (w + 1) s_b]   for w < W_b
                   The last n_b - W_b s_b tokens of the row belong to no window.
    router_logits  logits[b] = mean over w < W_b of  W2 gelu(W1 pooled[b, w] + b1) + b2     (GELU in its tanh form)
    decide         skip or repeat where that logit alone is the largest, else execute

`router` and `router_windows` are the two ops that are made of them, see `drllm_fast.ops`.

After Dr.LLM (arXiv 2510.12773), where W = 8 and the router is as wide as 128: the windows keep some of the order of a
long prompt, and the logits, not the windows, are averaged. Both are computed in fp32, whatever the dtype of the input
and whether or not autocast is on.

A row without tokens has no windows. Its logits are zeros: no class is favoured, and a tie means that the block is
executed once.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from drllm_fast.registration import check_integer

CLASSES = 3
SKIP, EXECUTE, REPEAT = range(CLASSES)


def check_router(
    x: Tensor, cu_seqlens: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, cost: Tensor, windows: int
) -> None:
    """Raises TypeError or ValueError unless the arguments of the op `router` belong together."""
    named = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2, "cost": cost}
    _check_floating(named)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if x.ndim != 2 or cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise ValueError(f"x must be [T, d] and cu_seqlens [B + 1], got {list(x.shape)} and {list(cu_seqlens.shape)}")
    _check_weights([], x.shape[1], w1, b1, w2, b2)
    if cost.shape != (CLASSES,):
        raise ValueError(f"cost must be [{CLASSES}], got {list(cost.shape)}")
    check_integer("windows", windows, 1)
    _check_devices(x, {**named, "cu_seqlens": cu_seqlens})


def check_router_windows(pooled: Tensor, counts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    """Raises TypeError or ValueError unless the arguments of the op `router_windows` belong together."""
    named = {"pooled": pooled, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    _check_floating(named)
    if counts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"counts must be int32 or int64, got {counts.dtype}")
    if pooled.ndim != 4 or counts.shape != pooled.shape[1:2]:
        raise ValueError(
            f"pooled must be [L, B, windows, d] and counts [B], got {list(pooled.shape)} and {list(counts.shape)}"
        )
    if any(t.shape[:1] != pooled.shape[:1] for t in (w1, b1, w2, b2)):
        raise ValueError(f"w1, b1, w2, b2 must have {len(pooled)} layers, as pooled has")
    _check_weights([len(pooled)], pooled.shape[3], w1, b1, w2, b2)
    _check_devices(pooled, {**named, "counts": counts})


def _check_floating(named: dict[str, Tensor]) -> None:
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, got {tensor.dtype}")


def _check_devices(first: Tensor, named: dict[str, Tensor]) -> None:
    for name, tensor in named.items():
        if tensor.device != first.device:
            raise ValueError(f"{next(iter(named))} is on {first.device}, {name} on {tensor.device}; move one of them")


def _check_weights(layers: list[int], hidden_size: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    """`layers`: the sizes in front of those of one layer."""
    shapes = [list(t.shape) for t in (w1, b1, w2, b2)]
    width = w1.shape[-2] if w1.ndim == len(layers) + 2 else 0
    of_a_layer = [[width, hidden_size], [width], [CLASSES, width], [CLASSES]]
    if shapes != [[*layers, *shape] for shape in of_a_layer]:
        raise ValueError(
            f"w1, b1, w2, b2 of a layer must be [h, {hidden_size}], [h], [{CLASSES}, h], [{CLASSES}], got {shapes}"
        )


def pool_windows(hidden: Tensor, cu_seqlens: Tensor, windows: int) -> tuple[Tensor, Tensor]:
    """Windowed means of the packed rows: pooled fp32 [B, windows, d] and counts int64 [B], the W_b of each row.

    hidden      floating [P, d], the tokens of all rows end to end; any strides
    cu_seqlens  int32 or int64 [B + 1], from 0 to P: row b owns hidden[cu_seqlens[b] : cu_seqlens[b + 1]]
    windows     at least 1; windows that a row does not use are zero

    Waits for the device once, to read cu_seqlens. Raises TypeError or ValueError.
    """
    if not hidden.is_floating_point() or hidden.ndim != 2:
        raise ValueError(f"hidden must be floating [P, d], got {hidden.dtype} {list(hidden.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise ValueError(f"cu_seqlens must be [B + 1], got {list(cu_seqlens.shape)}")
    check_integer("windows", windows, 1)
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != len(hidden) or any(start > end for start, end in pairwise(ends)):
        raise ValueError(f"cu_seqlens must rise from 0 to the {len(hidden)} tokens of hidden, got {ends}")

    pooled = hidden.new_zeros(len(ends) - 1, windows, hidden.shape[1], dtype=torch.float32)
    counts = []
    for row, (start, end) in enumerate(pairwise(ends)):
        used = min(windows, end - start)
        counts.append(used)
        if used:
            size = (end - start) // used
            tokens = hidden[start : start + used * size].float()
            pooled[row, :used] = tokens.unflatten(0, (used, size)).mean(dim=1)
    return pooled, torch.tensor(counts, dtype=torch.int64, device=hidden.device)


def router_logits(pooled: Tensor, counts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The router's logits, fp32 [B, 3]: the mean over each row's windows of its two-layer perceptron.

    pooled  floating [B, windows, d] and counts integer [B], as `pool_windows` returns them
    w1 [h, d], b1 [h], w2 [3, h], b2 [3], floating

    Differentiable. Rows with counts 0 get zeros. Raises ValueError for shapes that do not belong together.
    """
    _check_weights([], w1.shape[-1], w1, b1, w2, b2)
    hidden_size = w1.shape[1]
    if pooled.ndim != 3 or pooled.shape[2] != hidden_size or counts.shape != pooled.shape[:1]:
        raise ValueError(
            f"pooled must be [B, windows, {hidden_size}] and counts [B], got {list(pooled.shape)} and "
            f"{list(counts.shape)}"
        )
    with torch.autocast(pooled.device.type, enabled=False):
        inner = F.gelu(F.linear(pooled.float(), w1.float(), b1.float()), approximate="tanh")
        each = F.linear(inner, w2.float(), b2.float())  # [B, windows, 3]
    used = torch.arange(pooled.shape[1], device=pooled.device) < counts.unsqueeze(1)  # [B, windows]
    return each.masked_fill(~used.unsqueeze(2), 0).sum(dim=1) / counts.clamp(min=1).unsqueeze(1)


def decide(logits: Tensor) -> Tensor:
    """Decisions int8 [...] from scores [..., 3]: skip or repeat only where it beats both others, so that every tie, and
    every NaN, executes the block as the dense model would."""
    skip, execute, repeat = logits.unbind(-1)
    decisions = torch.full_like(skip, EXECUTE, dtype=torch.int8)
    decisions.masked_fill_(skip > torch.maximum(execute, repeat), SKIP)
    return decisions.masked_fill_(repeat > torch.maximum(execute, skip), REPEAT)


def router(
    x: Tensor, cu_seqlens: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, cost: Tensor, windows: int
) -> tuple[Tensor, Tensor]:
    pooled, counts = pool_windows(x, cu_seqlens, min(windows, max(x.shape[0], 1)))  # no row uses more
    logits = router_logits(pooled, counts, w1, b1, w2, b2) - cost.float()
    return logits, decide(logits)


def router_windows(pooled: Tensor, counts: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    layers, rows, windows, width = pooled.shape
    with torch.autocast(pooled.device.type, enabled=False):
        inner = torch.baddbmm(b1.float().unsqueeze(1), pooled.float().flatten(1, 2), w1.float().transpose(1, 2))
        inner = F.gelu(inner, approximate="tanh").view(layers, rows, windows, b1.shape[1])
    used = torch.arange(windows, device=pooled.device) < counts.unsqueeze(1)  # [B, windows]
    # The second layer is linear, so that the mean may come first: windows times less work.
    mean = inner.masked_fill(~used.unsqueeze(2), 0).sum(2) / counts.clamp(min=1).unsqueeze(1)  # [L, B, h]
    logits = torch.baddbmm(b2.float().unsqueeze(1), mean, w2.float().transpose(1, 2))
    return logits.masked_fill((counts == 0).unsqueeze(1), 0)


def router_gradients(
    grad: Tensor,
    pooled: Tensor,
    counts: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    of_pooled: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """What `router_windows` passes back for grad [L, B, 3]: the gradients of pooled, w1, b1, w2 and b2, in fp32.

    of_pooled: else the first, a third of the work, is None.
    """
    layers, rows, windows, width = pooled.shape
    grad = grad.float().masked_fill((counts == 0).unsqueeze(1), 0)
    flat = pooled.float().flatten(1, 2)  # [L, B * windows, d]
    inner = torch.baddbmm(b1.float().unsqueeze(1), flat, w1.float().transpose(1, 2))
    used = (torch.arange(windows, device=pooled.device) < counts.unsqueeze(1)) / counts.clamp(min=1).unsqueeze(1)
    shares = used.reshape(-1, 1)  # [B * windows, 1], each window's share of its row's mean
    mean = (F.gelu(inner, approximate="tanh") * shares).view(layers, rows, windows, b1.shape[1]).sum(2)
    grad_mean = grad @ w2.float()  # [L, B, h]
    grad_inner = grad_mean.repeat_interleave(windows, dim=1) * shares
    grad_inner = torch.ops.aten.gelu_backward(grad_inner, inner, approximate="tanh")
    return (
        (grad_inner @ w1.float()).view_as(pooled) if of_pooled else None,
        grad_inner.transpose(1, 2) @ flat,
        grad_inner.sum(1),
        grad.transpose(1, 2) @ mean,
        grad.sum(1),
    )


def token_windows(cu_seqlens: Tensor, tokens: int, windows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where `pool_windows` puts each token, without waiting for the device: slot int64 [tokens], the flat position in
    [B, windows], or B * windows for a token that no window takes; share fp32 [tokens], its weight in the mean; counts
    int64 [B]."""
    lengths = cu_seqlens.diff().long()
    counts = lengths.clamp(max=windows)
    token = torch.arange(tokens, device=cu_seqlens.device)
    row = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    size = (lengths // counts.clamp(min=1))[row]
    window = (token - cu_seqlens[row]) // size
    slot = torch.where(window < counts[row], row * windows + window, counts.shape[0] * windows)
    return slot, 1 / size, counts


def router_backward(
    grad: Tensor, x: Tensor, cu_seqlens: Tensor, windows: int, *weights: Tensor, of_x: bool = True
) -> tuple[Tensor | None, ...]:
    """What `router` passes back for grad [B, 3]: the gradients of x, w1, b1, w2 and b2, in fp32.

    of_x: else the first is None.
    """
    slot, share, counts = token_windows(cu_seqlens, x.shape[0], windows)
    share = share.unsqueeze(1)
    slots = counts.shape[0] * windows
    pooled = x.new_zeros(slots + 1, x.shape[1], dtype=torch.float32).index_add(0, slot, x.float() * share)
    pooled = pooled[:slots].view(1, counts.shape[0], windows, x.shape[1])
    grad_pooled, *grads = router_gradients(
        grad.unsqueeze(0), pooled, counts, *(w.unsqueeze(0) for w in weights), of_pooled=of_x
    )
    grad_x = None if grad_pooled is None else F.pad(grad_pooled[0].flatten(0, 1), (0, 0, 0, 1))[slot] * share
    return grad_x, *(g.squeeze(0) for g in grads)
