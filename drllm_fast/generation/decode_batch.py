"""One decode step of rows with their own paths: everything about the batch is laid out when its rows change, so that a
step moves two tables on by one token and runs the model.

tokens [B] --embed--> hidden [1, B, d]
   at each layer, for each of its visits:  the rows that run it -> the layer's own forward -> back in their places
      new keys and values go into each row's span of the pool, at the places `written`; attention reads the span
logits [B, V]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drllm_fast.generation.decode_forward import DecodeForward
from drllm_fast.generation.kv_pool import KVPool
from drllm_fast.generation.prompt_forward import EngineCache, run_model
from drllm_fast.rows_ops import scatter_rows


@dataclass
class RowGroup:
    """The rows of a batch that run a visit: all (index and span None), neighbours (a view), or gathered."""

    rows: np.ndarray
    span: tuple[int, int] | None  # first row and number
    index: Tensor | None  # int64, on the device
    cu_seqlens: Tensor  # int32 [k + 1]: one token each

    def take(self, x: Tensor) -> Tensor:
        """The group's part of x [1, B, ...]."""
        if self.span is not None:
            return x.narrow(1, *self.span)
        return x if self.index is None else x.index_select(1, self.index)

    def put(self, x: Tensor, y: Tensor) -> Tensor:
        """x [1, B, d] with y [1, k, d] in the group's places."""
        if self.span is not None:
            first, count = self.span
            return torch.cat((x[:, :first], y, x[:, first + count :]), dim=1)
        return y if self.index is None else scatter_rows(x[0], self.index, y[0]).unsqueeze(0)


class DecodeVisit:
    """One application of a block in a step. The tables are views into those of the whole batch."""

    __slots__ = ("layer", "group", "starts", "lengths", "written", "batch", "keys", "values")

    def __init__(self, layer: int, group: RowGroup, tables: tuple[Tensor, ...], batch: DecodeBatch):
        self.layer, self.group, self.batch = layer, group, batch
        self.starts, self.lengths, self.written = tables
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    # What the attention function asks for, as of `key_rows.KeyRows`.
    def segments(self) -> tuple[list[int], list[int], list[int]]:
        return [1] * len(self.group.rows), self.starts.tolist(), self.lengths.tolist()

    def layout(self, device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor, int, int], bool]:
        return (self.group.cu_seqlens, self.starts, self.lengths, 1, self.batch.longest), False


class DecodeBatch(DecodeForward):
    """Rows that decode together, and the forward of their next step.

    plan      int8 [B, L], the rows' paths
    starts    where each row's span of the pool begins
    capacity  tokens of each visit in the span
    lengths   tokens that each row has there
    """

    def __init__(
        self,
        owner: object,
        pool: KVPool,
        plan: np.ndarray,
        starts: Sequence[int],
        capacity: Sequence[int],
        lengths: Sequence[int],
        device: torch.device,
    ):
        super().__init__(owner, pool)
        self.longest = max(lengths)
        self._groups: dict[bytes, RowGroup] = {}
        self._parts: dict[tuple, tuple[object, object]] = {}
        self._layers: list[list[DecodeVisit]] = [[] for _ in range(plan.shape[1])]

        runs, begins = visit_places(plan, starts, capacity)
        lengths = np.asarray(lengths)
        visits = [(at, np.flatnonzero(runs[:, at])) for at in np.flatnonzero(runs.any(axis=0))]
        first = np.concatenate([begins[:0, 0], *(begins[rows, at] for at, rows in visits)])
        held = np.concatenate([lengths[:0], *(lengths[rows] for _, rows in visits)])
        # One copy to the device for all of it. `written` is where the next token goes, `held` counts it once it is.
        table = torch.from_numpy(np.stack((first, held, first + held - 1)))
        table = table.to(device, non_blocking=True)
        begin, self._held = table[:2].to(torch.int32)
        self._written = table[2]
        self.positions = torch.from_numpy(lengths - 1).to(device, non_blocking=True).unsqueeze(0)
        offset = 0
        for at, rows in visits:
            there = slice(offset, offset + len(rows))
            tables = begin[there], self._held[there], self._written[there]
            visit = DecodeVisit(int(at) // 2, self._group(rows, len(plan), device), tables, self)
            self._layers[visit.layer].append(visit)
            offset += len(rows)

    def _group(self, rows: np.ndarray, batch: int, device: torch.device) -> RowGroup:
        key = rows.tobytes()
        if key not in self._groups:
            span = index = None
            if len(rows) < batch:
                if rows[-1] - rows[0] == len(rows) - 1:
                    span = int(rows[0]), len(rows)
                else:
                    index = torch.from_numpy(rows).to(device, non_blocking=True)
            cu_seqlens = torch.arange(len(rows) + 1, dtype=torch.int32, device=device)
            self._groups[key] = RowGroup(rows, span, index, cu_seqlens)
        return self._groups[key]

    @property
    def visits(self) -> int:
        """Blocks that run in a step, whoever runs them."""
        return sum(map(len, self._layers))

    def step(self, model: nn.Module, cache: EngineCache, tokens: Tensor) -> Tensor:
        """Write the rows' newest tokens int64 [B], and the logits [B, V] of the next."""
        self._latest = -1
        self._parts.clear()
        self._held += 1
        self._written += 1
        self.positions += 1
        self.longest += 1
        return run_model(model, self, cache, tokens, self.positions, 0)

    # -- what the seams of the model ask for
    def run_layer(self, module: nn.Module, forward: Callable[..., Tensor], hidden: Tensor, *args, **kwargs) -> Tensor:
        """All visits of one block: hidden [1, B, d] -> [1, B, d]."""
        layer = self.entered(module)
        for visit in self._layers[layer]:
            self.visit, group = visit, visit.group
            out = forward(
                module,
                group.take(hidden),
                *(self._part(a, group) for a in args),
                **{k: self._part(a, group) for k, a in kwargs.items()},
            )
            hidden = group.put(hidden, out)
        return hidden

    def _part(self, argument: object, group: RowGroup) -> object:
        """The part of a layer's argument that belongs to the group's rows, kept for the layers that share it."""
        if isinstance(argument, Tensor):
            if group.span is None and group.index is None:
                return argument
            if argument.ndim < 2 or argument.shape[1] != self.positions.shape[1]:
                return argument
            key = (id(argument), id(group))
            if key not in self._parts:  # the argument is kept beside its part, or its id could be given away
                self._parts[key] = (argument, group.take(argument))
            return self._parts[key][1]
        if isinstance(argument, tuple | list):
            return type(argument)(self._part(a, group) for a in argument)
        if isinstance(argument, dict):
            return {k: self._part(a, group) for k, a in argument.items()}
        return argument


def place_prompts(run: Any, pool: KVPool, starts: Sequence[int], capacity: Sequence[int]) -> None:
    """Copy what a `PromptForward` kept into the rows' spans."""
    lengths = np.asarray(run.packed.lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    runs, begins = visit_places(run.plan.numpy(), starts, capacity)
    visits = [(layer, number) for layer, kept in enumerate(run.kept) for number in range(len(kept))]
    places = []
    for layer, number in visits:
        mine = runs[row, 2 * layer + number]
        places.append(begins[row[mine], 2 * layer + number] + within[mine])
    if not places:
        return
    index = torch.from_numpy(np.concatenate(places)).to(run.packed.device, non_blocking=True)
    for (layer, number), here in zip(visits, index.split([len(place) for place in places]), strict=True):
        pool.write(here, *run.kept[layer][number])


def visit_places(plan: np.ndarray, starts: Sequence[int], capacity: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """For a plan [B, L], both [B, 2 L], visit (l, n) in column 2 l + n: which visits a row runs, and where in the pool
    their keys begin."""
    runs = np.stack((plan >= 1, plan == 2), axis=2).reshape(len(plan), 2 * plan.shape[1])
    return runs, np.atleast_1d(starts)[:, None] + (np.cumsum(runs, axis=1) - runs) * np.atleast_1d(capacity)[:, None]
