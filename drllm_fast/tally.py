"""What the executor counted since a prompt batch was prefilled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drllm_fast.cache import RoutedCache
from drllm_fast.executor import RoutedForward
from drllm_fast.stats import RoutingStats


@dataclass
class Tally:
    """Kept as plain numbers, for a decode step adds to it. It travels with the batch's cache, so that threads and
    interleaved batches do not mix. The fields are those of `RoutingStats`."""

    plan: Tensor
    tokens: list[int]
    cached: list[int]
    layer_rows: list[int]
    layer_tokens: list[int]
    bytes_per_token: list[int]
    forwards: int

    @classmethod
    def of(cls, run: RoutedForward, cache: RoutedCache | None, *, continued: bool) -> Tally:
        """The batch's tally with one more forward in it."""
        cached = [0] * run.packed.batch if cache is None else cache.lengths
        if continued:
            old = cache.tally
            same = len(old.tokens) == run.packed.batch
            tally = cls(
                run.plan,
                [a + b for a, b in zip(old.tokens, run.packed.lengths, strict=True)] if same else cached,
                cached,
                [a + b for a, b in zip(old.layer_rows, run.layer_rows, strict=True)],
                [a + b for a, b in zip(old.layer_tokens, run.layer_tokens, strict=True)],
                old.bytes_per_token,
                old.forwards + 1,
            )
        else:
            size = [0] * len(run.layer_rows) if cache is None else cache.bytes_per_token()
            tally = cls(run.plan, run.packed.lengths, cached, run.layer_rows, run.layer_tokens, size, 1)
        if cache is not None:
            cache.tally = tally
        return tally

    def stats(self, windows: list[int]) -> RoutingStats:
        numbers = (self.tokens, self.cached, self.layer_rows, self.layer_tokens, self.bytes_per_token, windows)
        tokens, cached, rows, visited, size, window = (
            torch.tensor(n, dtype=torch.int64, device="cpu") for n in numbers
        )
        return RoutingStats(
            plan=self.plan.clone(),  # the cache goes by this one
            tokens=tokens,
            cached=cached,
            layer_rows=rows,
            layer_tokens=visited,
            kv_bytes_per_token=size,
            kv_window=window,
            forwards=self.forwards,
        )
