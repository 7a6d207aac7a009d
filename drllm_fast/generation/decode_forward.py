"""What the forwards of decode steps have in common: what the seams of the model ask for while a visit runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from drllm_fast.generation.kv_pool import KVPool


class DecodeForward:
    """A forward of one new token a row, whose keys and values lie in a pool.

    `visit` is the visit that runs: `written` says where its new keys go, and it answers the attention function as
    `key_rows.KeyRows` does.
    """

    takes_base = True  # the base model's forward is run as it is (`swap.routed_base`)

    def __init__(self, owner: object, pool: KVPool):
        self.owner, self.pool = owner, pool
        self.visit: Any = None
        self._latest = -1  # the layer that ran last

    def run_base(self, forward: Callable[..., Any], **kwargs) -> Any:
        return forward(**kwargs)

    def entered(self, module: nn.Module) -> int:
        """The number of the layer that is to run."""
        layer = module._drllm_layer
        if layer <= self._latest:
            raise NotImplementedError("this model runs a layer more than once a forward; use model.generate")
        self._latest = layer
        return layer

    def store(self, cache: object, keys: Tensor, values: Tensor) -> None:
        visit = self.visit
        self.pool.write(visit.written, keys, values)
        visit.keys, visit.values = keys, values

    def attended(self, module: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Any]:
        visit = self.visit
        if keys is not visit.keys or values is not visit.values:
            raise NotImplementedError(
                f"{type(module).__name__} changes keys or values between the cache and the attention; "
                "use model.generate"
            )
        visit.keys = visit.values = None
        return self.pool.keys.unsqueeze(0), self.pool.values.unsqueeze(0), visit
