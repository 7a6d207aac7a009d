"""The small integer tensors of a forward (positions, indices, layouts): made on the host, moved to a device together.

A copy to a GPU that waits, as torch.tensor(list, device="cuda") does, waits for all work queued before it; and one copy
for each list would make a decode step cost more copies the more layers a model has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ALIGNED = 16  # bytes, as kernels like their pointers


class Tables:
    """Flat tensors by a key that says what is in them. What is known before it is needed, `add` announces: it travels
    with the first that is asked for."""

    def __init__(self) -> None:
        self._host: dict[tuple, Tensor] = {}
        self._there: dict[torch.device, dict[tuple, Tensor]] = {}

    def add(self, key: tuple, make: Callable[[], Tensor]) -> None:
        if key not in self._host:
            self._host[key] = make()

    def get(self, key: tuple, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """The tensor of `key` on `device`; `make` is asked for it, on the CPU, where it was not announced."""
        self.add(key, make)
        if device.type == "cpu":
            return self._host[key]
        there = self._there.setdefault(device, {})
        if key not in there:
            self._send(device, there)
        return there[key]

    def _send(self, device: torch.device, there: dict[tuple, Tensor]) -> None:
        waiting = {key: table for key, table in self._host.items() if key not in there}
        at, spans = 0, {}
        for key, table in waiting.items():
            spans[key] = slice(at, at + table.nbytes)
            at += -(-table.nbytes // ALIGNED) * ALIGNED
        staged = torch.empty(at, dtype=torch.uint8, device="cpu")
        for key, table in waiting.items():
            staged[spans[key]].view(table.dtype).copy_(table)
        moved = staged.to(device, non_blocking=True)
        for key, table in waiting.items():
            there[key] = moved[spans[key]].view(table.dtype)
