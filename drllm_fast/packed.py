"""Packing: the real tokens of a batch end to end, and subsets of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from drllm_fast.key_rows import cu_seqlens_table
from drllm_fast.ops import active_tokens, scatter_rows
from drllm_fast.tables import Tables


@dataclass(frozen=True)
class RowSet:
    """Some rows of a packed batch.

    rows     indices of the rows, ascending
    lengths  tokens of each of those rows
    tokens   their number
    start    where their tokens begin in the packed batch
    index    int64 [tokens], where their tokens lie; None when they are one run, and a view serves
    """

    rows: tuple[int, ...]
    lengths: list[int]
    tokens: int
    start: int
    index: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """The set's tokens of x [1, T, ...]."""
        if self.index is None:
            return x.narrow(1, self.start, self.tokens)
        return x.index_select(1, self.index.to(x.device))

    def put(self, x: Tensor, y: Tensor) -> Tensor:
        """A copy of x [1, T, d] with y [1, tokens, d] in the places of the set's tokens."""
        if self.index is None:
            return torch.cat((x[:, : self.start], y, x[:, self.start + self.tokens :]), dim=1)
        return scatter_rows(x[0], self.index, y[0]).unsqueeze(0)


class PackedRows:
    """The layout of one forward: the tokens of rows of these lengths, end to end."""

    def __init__(self, lengths: list[int], device: torch.device):
        self.batch, self.lengths, self.device = len(lengths), lengths, device
        self.offsets = [0, *accumulate(lengths)]
        self.tokens = self.offsets[-1]
        self.tables = Tables()
        self.everything = RowSet(tuple(range(len(lengths))), lengths, self.tokens, 0, None)
        self._sets: dict[tuple[tuple[int, ...], torch.device], RowSet] = {}

    def announce_positions(self, past: list[int]) -> None:
        self.tables.add(("positions", *past), lambda: _ranges(past, self.lengths))

    def positions(self, past: list[int]) -> Tensor:
        """Positions [1, T]: each row counts on from the tokens it has already run, `past` [B]."""
        return self.tables.get(("positions", *past), lambda: _ranges(past, self.lengths), self.device).unsqueeze(0)

    def subset(self, rows: tuple[int, ...], device: torch.device) -> RowSet:
        """The tokens of `rows`; remembered, since neighbouring blocks mostly run the same rows."""
        if len(rows) == self.batch:
            return self.everything
        known = self._sets.get((rows, device))
        if known is None:
            lengths, index = [self.lengths[r] for r in rows], None
            if _scattered(rows):
                index = self.tables.get(("rows", *rows), lambda: self._tokens_of(rows), device)
            self._sets[rows, device] = known = RowSet(rows, lengths, sum(lengths), self.offsets[rows[0]], index)
        return known

    def announce_subset(self, rows: tuple[int, ...]) -> None:
        if _scattered(rows):
            self.tables.add(("rows", *rows), lambda: self._tokens_of(rows))

    def _tokens_of(self, rows: tuple[int, ...]) -> Tensor:
        active = torch.zeros(self.batch, dtype=torch.int8, device="cpu")
        active[list(rows)] = 1
        return active_tokens(active, torch.tensor(self.offsets, dtype=torch.int32, device="cpu"), at_least=1)[0]

    def heads(self, lengths: list[int], device: torch.device) -> tuple[Tensor | None, Tensor]:
        """The first lengths[b] tokens of each row: their index [P] (None for all tokens) and cu_seqlens [B + 1].
        Remembered, since every block's router asks for them."""
        index, cu_seqlens = self._head_tables(lengths)
        cu_seqlens = self.tables.get(*cu_seqlens, device)
        return None if index is None else self.tables.get(*index, device), cu_seqlens

    def announce_heads(self, lengths: list[int]) -> None:
        for table in self._head_tables(lengths):
            if table is not None:
                self.tables.add(*table)

    def _head_tables(self, lengths: list[int]) -> tuple[tuple | None, tuple]:
        index = ("heads", *lengths), lambda: _ranges(self.offsets[:-1], lengths)
        return None if list(lengths) == self.lengths else index, cu_seqlens_table(lengths)


class PackedBatch(PackedRows):
    """Packed rows that were a padded batch: B rows of S columns, of which row b has `lengths[b]` real tokens.

    `real` is a bool mask [B, S], on the CPU lest it be read from a device, or None when every column of every row is
    real; then packing and unpacking are views.
    """

    def __init__(self, real: Tensor | None, batch: int, columns: int, device: torch.device):
        self.real = None if real is None else real.cpu()
        super().__init__([columns] * batch if real is None else self.real.sum(1).tolist(), device)
        self.columns = columns
        if real is not None:
            self.tables.add(("tokens",), self._tokens)
            self.tables.add(("nearest",), self._nearest)

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [1, T, ...]"""
        flat = x.reshape(self.batch * self.columns, *x.shape[2:])
        if self.real is not None:
            flat = flat.index_select(0, self.tables.get(("tokens",), self._tokens, x.device))
        return flat.unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """[1, T, ...] -> [B, S, ...]. A column of padding repeats the last real token before it (the first of the row
        where there is none), so that the last column of a right-padded row predicts the row's next token. A row
        without tokens is zeros."""
        shape = (self.batch, self.columns, *x.shape[2:])
        if self.real is None:
            return x.reshape(shape)
        if self.tokens == 0:
            return x.new_zeros(shape)
        nearest = self.tables.get(("nearest",), self._nearest, x.device)
        out = x[0].index_select(0, nearest).reshape(shape)
        for row, n in enumerate(self.lengths):
            if n == 0:
                out[row] = 0
        return out

    def _tokens(self) -> Tensor:
        return self.real.reshape(-1).nonzero().squeeze(1)

    def _nearest(self) -> Tensor:
        within = (self.real.cumsum(1) - 1).clamp(min=0)
        starts = torch.tensor(self.offsets[:-1], device="cpu").clamp(max=max(self.tokens - 1, 0))
        return (within + starts.unsqueeze(1)).reshape(-1)


def _scattered(rows: tuple[int, ...]) -> bool:
    return rows[-1] - rows[0] >= len(rows)


def _ranges(starts: list[int], lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(a, a + n, device="cpu") for a, n in zip(starts, lengths, strict=True)])
