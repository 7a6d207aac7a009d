"""Where one visit keeps the keys and values of the rows that ran it: end to end, without padding, with room to grow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import accumulate
from operator import add, le, sub

import torch
from torch import Tensor

from drllm_fast.tables import Tables

# Room left behind each row when its slot grows, in tokens: a copy of the slot every 64 steps, not at each one.
GROWTH = 64


class KVSlot:
    """Keys and values of one visit, [1, heads, N, head_dim]; row i of the slot owns a segment of N.

    Segment i starts at starts[i], may be written up to room[i] tokens and holds the row's tokens from position first[i]
    on (earlier ones fell out of a sliding window). Room is 0 in tensors that a forward or autograd may still look at.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.starts: list[int] = []
        self.room: list[int] = []
        self.first: list[int] = []

    def write(self, k: Tensor, v: Tensor, past: list[int], new: list[int], keep: int | None, tables: Tables) -> KVSlot:
        """Store new[i] tokens of row i at position past[i]. `keep`: past tokens a sliding window still needs. `tables`:
        of this forward, where slots that are laid out alike find where their tokens go.

        Returns the slot to attend to: this one, or the whole prompt where only its end is kept."""
        if self.keys is None:
            self._hold(_compact(k), _compact(v), new, first=[0] * len(new))
            if keep is None or max(new) <= keep + GROWTH:
                return self
            whole = copy.copy(self)
            self._grow(new, [0] * len(new), keep)
            return whole
        if torch.is_grad_enabled() or self.keys.requires_grad:
            self._concatenate(k, v, past, new)
            return self
        at = self._reserve(past, new, keep)
        if len(new) == 1:
            self.keys.narrow(2, at[0], new[0]).copy_(k)
            self.values.narrow(2, at[0], new[0]).copy_(v)
            return self
        index = tables.get(*self._written(at, new), k.device)
        self.keys.index_copy_(2, index, k)
        self.values.index_copy_(2, index, v)
        return self

    def hold(self, keys: Tensor, values: Tensor, lengths: list[int]) -> None:
        """Whole rows of these lengths end to end, instead of what was here."""
        self._hold(keys, values, lengths, first=[0] * len(lengths))

    def held(self, past: list[int], new: list[int]) -> list[int]:
        """How many keys each row has here once its new tokens are written."""
        return [p + n - f for p, n, f in zip(past, new, self.first, strict=True)]

    def announce_write(self, past: list[int], new: list[int], keep: int | None, tables: Tables) -> None:
        """What `write` will do with the layout, done before it: the room is made, and the index waits in `tables`."""
        if self.keys is None or torch.is_grad_enabled() or self.keys.requires_grad:
            return
        at = self._reserve(past, new, keep)
        if len(new) > 1:
            tables.add(*self._written(at, new))

    def _reserve(self, past: list[int], new: list[int], keep: int | None) -> list[int]:
        """Make room for new[i] tokens of row i; where in its segment they go."""
        at = list(map(sub, past, self.first))
        frozen = self.keys.is_inference() and not torch.is_inference_mode_enabled()
        if frozen or not all(map(le, map(add, at, new), self.room)):
            self._grow(past, new, keep)
            at = list(map(sub, past, self.first))
        return at

    def _written(self, at: list[int], new: list[int]) -> tuple[tuple, Callable[[], Tensor]]:
        def where() -> Tensor:
            return torch.tensor(
                [s + a + i for s, a, n in zip(self.starts, at, new, strict=True) for i in range(n)], device="cpu"
            )

        return ("written", *self.starts, *at, *new), where

    def take(self, sources: list[int], lengths: list[int], tables: Tables) -> None:
        """Row i becomes what row sources[i] was; `lengths` [old rows] are the tokens each old row has run."""
        if sources == list(range(len(self.starts))):
            return
        if not sources:
            self.__init__()
            return
        index = tables.get(*self._taken(sources, lengths), self.keys.device)
        self.keys, self.values = self.keys.index_select(2, index), self.values.index_select(2, index)
        self.first = [self.first[i] for i in sources]
        self.room = [lengths[i] - f + 1 for i, f in zip(sources, self.first, strict=True)]
        self.starts = [0, *accumulate(self.room[:-1])]

    def announce_take(self, sources: list[int], lengths: list[int], tables: Tables) -> None:
        if sources and sources != list(range(len(self.starts))):
            tables.add(*self._taken(sources, lengths))

    def _taken(self, sources: list[int], lengths: list[int]) -> tuple[tuple, Callable[[], Tensor]]:
        def which() -> Tensor:
            # One token of room, for beam search: it comes back at every step, and more would be copied for nothing.
            # It is filled with whatever lies at 0, and written before it is read.
            parts, spare = [], torch.zeros(1, dtype=torch.int64, device="cpu")
            for i in sources:
                parts += [
                    torch.arange(self.starts[i], self.starts[i] + lengths[i] - self.first[i], device="cpu"),
                    spare,
                ]
            return torch.cat(parts)

        return ("taken", tuple(self.starts), tuple(self.first), tuple(lengths), tuple(sources)), which

    def bytes_per_token(self) -> int:
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in (self.keys, self.values))

    def _hold(self, keys: Tensor, values: Tensor, held: list[int], first: list[int]) -> None:
        """Rows of held[i] tokens end to end, in tensors that must not be written to."""
        self.keys, self.values = keys, values
        self.starts, self.room, self.first = [0, *accumulate(held[:-1])], [0] * len(held), first

    def _grow(self, past: list[int], new: list[int], keep: int | None) -> None:
        """Lay the segments out anew, with room to spare, dropping what no sliding window can reach any more."""
        first = self.first if keep is None else [max(f, p - keep) for f, p in zip(self.first, past, strict=True)]
        kept = [p - f for p, f in zip(past, first, strict=True)]
        room = [k + n + max(GROWTH, (k + n) // 8) for k, n in zip(kept, new, strict=True)]
        starts = [0, *accumulate(room[:-1])]
        source = [s + f - old for s, f, old in zip(self.starts, first, self.first, strict=True)]

        def moved(old: Tensor) -> Tensor:
            fresh = old.new_empty(1, old.shape[1], sum(room), old.shape[3])
            for a, b, n in zip(source, starts, kept, strict=True):
                fresh.narrow(2, b, n).copy_(old.narrow(2, a, n))
            return fresh

        self.keys, self.values = moved(self.keys), moved(self.values)
        self.starts, self.room, self.first = starts, room, first

    def _concatenate(self, k: Tensor, v: Tensor, past: list[int], new: list[int]) -> None:
        # Autograd holds on to the keys that earlier steps used, so nothing may be written in place.
        offsets = [0, *accumulate(new)]
        kept = [p - f for p, f in zip(past, self.first, strict=True)]

        def joined(old: Tensor, fresh: Tensor) -> Tensor:
            parts = []
            for i, n in enumerate(kept):
                parts += [old.narrow(2, self.starts[i], n), fresh.narrow(2, offsets[i], new[i])]
            return torch.cat(parts, dim=2)

        held = [a + b for a, b in zip(kept, new, strict=True)]
        self._hold(joined(self.keys, k), joined(self.values, v), held, self.first)


def _compact(t: Tensor) -> Tensor:
    """`t` itself, unless it is a view that would keep a larger tensor (a fused qkv projection) alive."""
    return t if t.untyped_storage().nbytes() == t.numel() * t.element_size() else t.clone()
