"""One tensor of keys and one of values for all rows that are being answered, in which each row owns one span.

A span holds capacity x visits tokens: visit number v of a row's path begins at start + v * capacity. A block that a
path skips takes nothing, a repeat takes one capacity more; what is given back joins what is free beside it.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor


class KVPool:
    """Keys [H_kv, size + 1, D] and values [H_kv, size + 1, D_v], made when the first are written: their shape, dtype
    and device are the model's. The last place is never given away: it is for keys that nobody will look at.

    size   tokens of one visit that fit
    used   of them those in spans; peak: their most so far
    """

    def __init__(self, size: int):
        if size < 1:
            raise ValueError(f"a pool of keys and values needs room for at least one token, got {size}")
        self.size, self.used, self.peak = size, 0, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._free: list[tuple[int, int]] = [(0, size)]  # (start, tokens), ascending, never side by side

    @property
    def largest(self) -> int:
        """How many tokens the largest span may have that can be had now."""
        return max((room for _, room in self._free), default=0)

    def allocate(self, tokens: int) -> int | None:
        """Where a new span begins: the first place that is large enough, None where there is none."""
        if tokens < 1:
            raise ValueError(f"a span has at least one token, got {tokens}")
        for at, (start, room) in enumerate(self._free):
            if room >= tokens:
                self._free[at : at + 1] = [(start + tokens, room - tokens)] if room > tokens else []
                self.used += tokens
                self.peak = max(self.peak, self.used)
                return start
        return None

    def release(self, start: int, tokens: int) -> None:
        """Give a span back, or a part of one. ValueError for what is free already, or not of this pool."""
        at = bisect_left(self._free, (start,))
        before = self._free[at - 1] if at else (0, 0)
        after = self._free[at] if at < len(self._free) else (self.size, 0)
        if tokens < 1 or start < 0 or start + tokens > after[0] or (at and sum(before) > start):
            raise ValueError(f"tokens {start} to {start + tokens} are not a span of this pool")
        joins_before, joins_after = bool(at) and sum(before) == start, bool(after[1]) and start + tokens == after[0]
        low = before[0] if joins_before else start
        high = sum(after) if joins_after else start + tokens
        self._free[at - joins_before : at + joins_after] = [(low, high - low)]
        self.used -= tokens

    def write(self, index: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys [1, H_kv, n, D] and values [1, H_kv, n, D_v] where index int64 [n] says."""
        if self.keys is None:
            # Head after head, since attention reads one head of a row at a time: 1.8 times as fast as token after token
            # (64 rows of 100 tokens, 3 heads of 64, fp32, two cores with AVX2).
            self.keys, self.values = (t.new_empty(t.shape[1], self.size + 1, t.shape[3]) for t in (keys, values))
        for kept, new in ((self.keys, keys), (self.values, values)):
            if (kept.shape[0], kept.shape[2]) != (new.shape[1], new.shape[3]):
                raise NotImplementedError(
                    "this model's layers keep keys or values of different shapes, "
                    f"{[kept.shape[0], kept.shape[2]]} and {[new.shape[1], new.shape[3]]}; use model.generate"
                )
        self.keys.index_copy_(1, index, keys[0])
        self.values.index_copy_(1, index, values[0])

    def bytes_per_token(self) -> int:
        """Of one visit; 0 before the first are written."""
        if self.keys is None:
            return 0
        return sum(t.shape[0] * t.shape[2] * t.element_size() for t in (self.keys, self.values))


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in one visit, by a model's config."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * heads * dim * dtype.itemsize
