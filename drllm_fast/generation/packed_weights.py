"""Linear layers that multiply by weights packed beforehand, for as long as an engine runs, on the CPU.

With few rows, torch's own product lays the weights out anew at each call, and in bfloat16 on a processor without units
for it is several times slower than in float32 (benchmarks/bench_linear.py). Packed once, weights are read straight
through.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from drllm_fast import registration


class PackedLinear(nn.Linear):
    """A linear layer while it is packed. `weight` stays what it was, for whoever looks at it."""

    _drllm_panels: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self._drllm_panels.dtype or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)
        out = torch.ops.drllm_fast.packed_linear(rows, self._drllm_panels, self.bias, self.out_features)
        return out.view(*x.shape[:-1], self.out_features)


def packable(module: nn.Module) -> list[nn.Linear]:
    """The linear layers of a model that can be packed: plain ones, without hooks, of a dtype that the kernel takes."""
    if not registration.cpu_kernels:
        return []
    return [
        layer
        for layer in module.modules()
        if type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype in (torch.float32, torch.bfloat16)
        and type(layer.weight) is nn.Parameter
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    ]


@contextmanager
def packed(layers: list[nn.Linear]) -> Iterator[None]:
    """Inside, these layers multiply by packed copies of their weights, which take as much memory as the weights."""
    with ExitStack() as undo:
        for layer in layers:
            layer._drllm_panels = torch.ops.drllm_fast.pack_linear(layer.weight.detach())
            layer.__class__ = PackedLinear
            undo.callback(_unpack, layer)
        yield


def _unpack(layer: nn.Linear) -> None:
    layer.__class__ = nn.Linear
    del layer._drllm_panels


def linear_seconds(layers: list[nn.Linear], rows: int, *, rounds: int = 3) -> tuple[float, float]:
    """Seconds that all of these layers take for so many rows, as they are and packed. Of each shape a few are timed in
    turns, one after another, for a model's weights do not fit into caches."""
    shapes: dict[tuple, list[nn.Linear]] = {}
    for layer in layers:
        shapes.setdefault((tuple(layer.weight.shape), layer.bias is None), []).append(layer)
    totals = [0.0, 0.0]
    for alike in shapes.values():
        some = [(layer, torch.ops.drllm_fast.pack_linear(layer.weight.detach())) for layer in alike[:8]]
        x = torch.randn(rows, alike[0].in_features).to(alike[0].weight.dtype)
        times: tuple[list[float], list[float]] = ([], [])
        for layer, panels in some * rounds:
            began = time.perf_counter()
            functional.linear(x, layer.weight, layer.bias)
            between = time.perf_counter()
            torch.ops.drllm_fast.packed_linear(x, panels, layer.bias, layer.out_features)
            times[0].append(between - began)
            times[1].append(time.perf_counter() - between)
        for which in (0, 1):
            totals[which] += statistics.median(times[which]) * len(alike)
    return totals[0], totals[1]
