"""What the last prompt batch of a routed model cost: token visits and KV memory, against the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RoutingStats:
    """Counts of one prompt batch, from its prefill to the last token decoded after it.

    A *token visit* is one application of one block to one token. The dense model makes L of them a token.

    plan                [B, L]  int8   how often each row runs each layer: 0 skip, 1 execute, 2 repeat
    tokens              [B]     int64  tokens run per row since its prompt began, prompt and generated
    cached              [B]     int64  tokens of each row that the KV cache holds now
    layer_rows          [L]     int64  row visits that really ran at each layer, counted by the executor, both passes
    layer_tokens        [L]     int64  token visits that really ran at each layer, counted by the executor, both passes
    kv_bytes_per_token  [L]     int64  bytes of one token's K and V in one slot of the layer; 0 where nothing is cached
    kv_window           [L]     int64  sliding window of the layer in tokens; 0 for full attention
    forwards                    int    forward calls of the base model

    Raises ValueError where the shapes do not belong together.
    """

    plan: Tensor
    tokens: Tensor
    cached: Tensor
    layer_rows: Tensor
    layer_tokens: Tensor
    kv_bytes_per_token: Tensor
    kv_window: Tensor
    forwards: int

    def __post_init__(self) -> None:
        if self.plan.dim() != 2:
            raise ValueError(f"plan must be [rows, layers], got shape {tuple(self.plan.shape)}")
        rows, layers = self.plan.shape
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "plan" or not isinstance(value, Tensor):
                continue
            size = rows if field.name in ("tokens", "cached") else layers
            if value.shape != (size,):
                raise ValueError(
                    f"{field.name} must have shape ({size},) beside a plan of {rows} rows and {layers} layers, "
                    f"got {tuple(value.shape)}"
                )

    @classmethod
    def concat(cls, batches: Sequence[RoutingStats]) -> RoutingStats:
        """Several batches of one model as one: rows one after another, counts added. ValueError without a batch."""
        if not batches:
            raise ValueError("no batch to put together")
        return cls(
            plan=torch.cat([b.plan for b in batches]),
            tokens=torch.cat([b.tokens for b in batches]),
            cached=torch.cat([b.cached for b in batches]),
            layer_rows=sum(b.layer_rows for b in batches),
            layer_tokens=sum(b.layer_tokens for b in batches),
            kv_bytes_per_token=torch.stack([b.kv_bytes_per_token for b in batches]).amax(0),
            kv_window=batches[0].kv_window,
            forwards=sum(b.forwards for b in batches),
        )

    @property
    def layers_run(self) -> Tensor:
        """[B] int64: blocks applied to each row, a repeat counted twice; the dense model applies L."""
        return self.plan.sum(1, dtype=torch.int64)

    @property
    def visits(self) -> Tensor:
        """[B, L] int64: token visits that the plan asks for, `plan * tokens`."""
        return self.plan * self.tokens[:, None]

    @property
    def visits_run(self) -> int:
        """Token visits that really ran: the sum of the executor's own count, not of the plan."""
        return int(self.layer_tokens.sum())

    @property
    def visits_dense(self) -> int:
        """Token visits that the dense model would have made for the same tokens: L for each."""
        return int(self.tokens.sum()) * self.plan.shape[1]

    @property
    def share(self) -> float:
        """`visits_run / visits_dense`, 1.0 for the dense model; nan before any token has run."""
        return self.visits_run / self.visits_dense if self.visits_dense else float("nan")

    @property
    def per_row(self) -> Tensor:
        """[B] float32: blocks applied to each row over L, from the plan."""
        return self.layers_run / self.plan.shape[1]

    @property
    def per_layer(self) -> Tensor:
        """[L] float32: token visits that really ran at each layer over the tokens that passed it; at most 2."""
        return self.layer_tokens / self.tokens.sum()

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V held for all rows: cached tokens (at most the window) times visits times bytes a token."""
        return int(self.per_row_kv_bytes.sum())

    @property
    def kv_bytes_dense(self) -> int:
        """Bytes that the dense model would hold for the same tokens: one slot a layer."""
        return int(self.per_row_kv_bytes_dense.sum())

    @property
    def per_row_kv_bytes(self) -> Tensor:
        """[B] int64: bytes of K and V held for each row."""
        return (self._held * self.plan * self.kv_bytes_per_token).sum(1)

    @property
    def per_row_kv_bytes_dense(self) -> Tensor:
        """[B] int64: bytes that the dense model would hold for each row.

        A layer that no row ran has no slot to be measured; it is taken at the median of the layers that have one.
        """
        size = self.kv_bytes_per_token
        unseen = (self.plan == 0).all(0) & (size == 0)
        if (size > 0).any():
            size = torch.where(unseen, size[size > 0].median(), size)
        return (self._held * size).sum(1)

    @property
    def _held(self) -> Tensor:
        """[B, L] int64: tokens that one slot of the layer holds for the row."""
        cached, window = self.cached[:, None], self.kv_window[None]
        return torch.where(window > 0, torch.minimum(cached, window), cached)
