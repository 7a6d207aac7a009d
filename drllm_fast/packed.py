"""Packing: the real tokens of a batch end to end, and subsets of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from drllm_fast.ops import active_tokens


@dataclass(frozen=True)
class RowSet:
    """Some rows of a packed batch.

    rows     indices of the rows, ascending
    lengths  tokens of each of those rows
    index    int64 [tokens], where their tokens lie in the packed batch; None when the set is the whole batch
    tokens   their number
    """

    rows: tuple[int, ...]
    lengths: list[int]
    index: Tensor | None
    tokens: int


class PackedBatch:
    """The layout of one forward: B rows of S columns, of which row b has `lengths[b]` real tokens.

    `real` is a bool mask [B, S], or None when every column of every row is real; then packing and unpacking are views.
    """

    def __init__(self, real: Tensor | None, batch: int, columns: int, device: torch.device):
        self.batch, self.columns, self.device = batch, columns, device
        if real is None:
            self.lengths = [columns] * batch
            self.index = None
        else:
            real = real.to(device)
            self.lengths = real.sum(1).tolist()
            self.index = real.reshape(-1).nonzero().squeeze(1)  # [T]
        self.offsets = [0, *accumulate(self.lengths)]
        self._real, self._nearest = real, None
        self.tokens = self.offsets[-1]
        self.everything = RowSet(tuple(range(batch)), self.lengths, None, self.tokens)
        self._sets: dict[tuple[tuple[int, ...], torch.device], RowSet] = {}
        self._heads: dict[tuple[tuple[int, ...], torch.device], tuple[Tensor | None, Tensor]] = {}

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [1, T, ...]"""
        flat = x.reshape(self.batch * self.columns, *x.shape[2:])
        return (flat if self.index is None else flat.index_select(0, self.index)).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """[1, T, ...] -> [B, S, ...]. A column of padding repeats the last real token before it (the first of the row
        where there is none), so that the last column of a right-padded row predicts the row's next token. A row
        without tokens is zeros."""
        shape = (self.batch, self.columns, *x.shape[2:])
        if self.index is None:
            return x.reshape(shape)
        if self.tokens == 0:
            return x.new_zeros(shape)
        if self._nearest is None:
            within = (self._real.cumsum(1) - 1).clamp(min=0)
            starts = torch.tensor(self.offsets[:-1], device=self.device).clamp(max=self.tokens - 1)
            self._nearest = (within + starts.unsqueeze(1)).reshape(-1)
        out = x[0].index_select(0, self._nearest.to(x.device)).reshape(shape)
        if 0 in self.lengths:
            out[[row for row, n in enumerate(self.lengths) if n == 0]] = 0
        return out

    def positions(self, past: list[int]) -> Tensor:
        """Positions [1, T]: each row counts on from the tokens it has already run, `past` [B]."""
        parts = [torch.arange(p, p + n) for p, n in zip(past, self.lengths, strict=True)]
        return torch.cat(parts).unsqueeze(0).to(self.device)

    def subset(self, rows: tuple[int, ...], device: torch.device) -> RowSet:
        """The tokens of `rows`; remembered, since neighbouring blocks mostly run the same rows."""
        if len(rows) == self.batch:
            return self.everything
        known = self._sets.get((rows, device))
        if known is None:
            active = torch.zeros(self.batch, dtype=torch.int8)
            active[list(rows)] = 1
            index, _ = active_tokens(active, torch.tensor(self.offsets, dtype=torch.int32), at_least=1)
            known = RowSet(rows, [self.lengths[r] for r in rows], index.to(device), len(index))
            self._sets[rows, device] = known
        return known

    def heads(self, lengths: list[int], device: torch.device) -> tuple[Tensor | None, Tensor]:
        """The first lengths[b] tokens of each row: their index [P] (None for all tokens) and cu_seqlens [B + 1].
        Remembered, since every block's router asks for them."""
        key = (tuple(lengths), device)
        if key not in self._heads:
            parts = [torch.arange(a, a + n) for a, n in zip(self.offsets, lengths, strict=False)]
            index = None if list(lengths) == self.lengths else torch.cat(parts).to(device)
            self._heads[key] = index, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return self._heads[key]
