"""The KV cache of a routed model: one slot per visit, holding only the rows that ran it.

Invariant: a path is fixed when its prompt is prefilled, so every slot a row visits holds exactly that row's tokens.
One length per row therefore serves all layers, and it lives here, never in a layer. A forward that dies leaves the
lengths as they were, and the next one overwrites what it had written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from drllm_fast.active import ACTIVE
from drllm_fast.kv_slot import KVSlot
from drllm_fast.planner import DecodePlan, decode_plan
from drllm_fast.tables import Tables

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class RoutedLayer(CacheLayerMixin):
    """One decoder layer's place in a `RoutedCache`: a slot for each visit a path can pay."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, sliding_window: int | None = None, record_past: bool = False):
        super().__init__()
        self.slots = (KVSlot(), KVSlot())
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.record_past = record_past

    def activate_past_recording(self) -> None:
        self.record_past = True

    @property
    def keep(self) -> int | None:
        """How many tokens before a new one its sliding window still needs; None for all."""
        return None if self.sliding_window is None or self.record_past else self.sliding_window - 1

    def _ask_the_cache(self, *args, **kwargs):
        raise NotImplementedError(
            "a layer of a routed cache answers no questions by itself, since some rows may have skipped it; "
            "ask the cache (cache.get_seq_length(), cache.crop(-n), ...)"
        )

    lazy_initialization = update = get_mask_sizes = get_seq_length = get_max_length = _ask_the_cache


class RoutedCache(DynamicCache):
    """A `DynamicCache` whose rows follow their own layer paths. Made from an empty `DynamicCache` by the first
    routed forward, in place, so that whoever holds the cache keeps it.

    plan     int8 [B, L]   the path of each row (CPU)
    lengths  [B]           real tokens each row has run
    columns                tokens of a row as the caller counts them, padding included
    real     bool [B, columns] or None   which columns were real (CPU); None when all were
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self._route(len(self.layers))

    @staticmethod
    def convert(cache: DynamicCache, num_layers: int) -> Callable[[], None]:
        """Turn an empty `DynamicCache` into a `RoutedCache`, and return what undoes it.

        NotImplementedError, ValueError or TypeError for any other cache."""
        check_convertible(cache)
        before = dict(cache.__dict__)

        def undo() -> None:
            cache.__class__ = DynamicCache
            cache.__dict__.clear()
            cache.__dict__.update(before)

        cache.__class__ = RoutedCache
        cache._route(num_layers)
        return undo

    def revert(self) -> None:
        """An emptied cache becomes a plain `DynamicCache` again."""
        self.__dict__.clear()
        self.__class__ = DynamicCache
        DynamicCache.__init__(self)

    def __copy__(self) -> RoutedCache:
        return copy.deepcopy(self)  # lengths and slots belong together

    def __getstate__(self) -> dict:
        return {**self.__dict__, "model": None}  # a weak reference, which cannot be pickled

    def _route(self, num_layers: int) -> None:
        old = dict(enumerate(self.layers))
        layers = []
        for index in range(num_layers):
            layer = old.get(index)
            window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
            layers.append(RoutedLayer(window, getattr(layer, "record_past", False)))
        self.layers, self.layer_class_to_replicate = layers, None
        self._clear()

    def _clear(self) -> None:
        self.plan: Tensor | None = None
        self.lengths: list[int] = []
        self.columns = 0
        self.real: Tensor | None = None
        self.decided_by: object | None = None
        self.tally: object | None = None
        self.model: Callable[[], nn.Module | None] | None = None  # weak: a cache keeps no model alive
        self._decoded: DecodePlan | None = None

    # -- the executor's side ------------------------------------------------------------------------------------
    @property
    def decoded(self) -> DecodePlan:
        if self._decoded is None:
            self._decoded = decode_plan(self.plan)
        return self._decoded

    @property
    def schedule(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Per layer, the rows of its first and of its second visit."""
        return self.decoded.schedule

    def fix(self, plan: Tensor, decided_by: object) -> None:
        self.plan, self.decided_by, self._decoded = plan, decided_by, None

    def advance(self, lengths: list[int], columns: int, real: Tensor | None) -> None:
        """Commit a forward: its tokens are in the slots."""
        if real is not None or self.real is not None:
            every = torch.ones(len(lengths), self.columns + columns, dtype=torch.bool, device="cpu")
            old = every[:, : self.columns] if self.real is None else self.real
            new = every[:, self.columns :] if real is None else real.cpu()
            self.real = torch.cat([old, new], dim=1)
        past = self.lengths or [0] * len(lengths)
        self.lengths = [p + n for p, n in zip(past, lengths, strict=True)]
        self.columns += columns

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        forward = ACTIVE.get()
        if forward is None or forward.cache is not self:
            raise ValueError(
                "this cache was filled by a routed model and can only be used by it while routing is on; "
                "start the dense model (or another model) with a new cache"
            )
        forward.store(self, key_states, value_states)
        return key_states, value_states

    def bytes_per_token(self) -> list[int]:
        """Bytes that the keys and values of one token take in a slot of each layer. For a layer that no row has run,
        the largest of the others is taken; 0 if none has run."""
        slots = [layer.slots[0] for layer in self.layers]
        known = [0 if slot.keys is None else slot.bytes_per_token() for slot in slots]
        return [size or max(known) for size in known]

    def kv_bytes(self, *, allocated: bool = False) -> int:
        """Bytes of keys and values held for tokens; with `allocated`, of the tensors that hold them."""
        total = 0
        for index, layer in enumerate(self.layers):
            for number, slot in enumerate(layer.slots):
                if slot.keys is None:
                    continue
                rows = self.schedule[index][number]
                held = sum(self.lengths[r] - f for r, f in zip(rows, slot.first, strict=True))
                total += slot.bytes_per_token() * (slot.keys.shape[2] if allocated else held)
        return total

    # -- the side of `generate` and of the user ------------------------------------------------------------------
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return len(self.lengths) or -1

    @property
    def is_sliding(self) -> list[bool]:
        return [layer.is_sliding for layer in self.layers]

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self.layers)

    is_dummy = is_linear

    @property
    def is_compileable(self) -> bool:
        return False

    def __iter__(self):
        raise NotImplementedError(
            "a routed cache has no one tensor per layer to iterate over: each visit of a row has its own slot; "
            "copy the cache with copy.deepcopy, or use model.routing.stats"
        )

    def reset(self) -> None:
        for layer in self.layers:
            layer.slots = (KVSlot(), KVSlot())
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove columns of every row (a value <= 0, as for every cache)."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove as a value <= 0, given {tokens_to_remove}: "
                f"use crop({-tokens_to_remove}) to remove {tokens_to_remove} tokens"
            )
        if -tokens_to_remove > self.columns:
            raise ValueError(f"cannot remove {-tokens_to_remove} tokens from a cache of {self.columns}")
        columns = self.columns + tokens_to_remove
        if columns == 0:  # nothing is left that a path was chosen for
            self.reset()
            return
        real = None if self.real is None else self.real[:, :columns]
        lengths = [n + tokens_to_remove for n in self.lengths] if real is None else real.sum(1).tolist()
        for index, layer in enumerate(self.layers):
            for number, slot in enumerate(layer.slots):
                if slot.keys is None or not layer.is_sliding:
                    continue
                for row, first in zip(self.schedule[index][number], slot.first, strict=True):
                    if first > max(0, lengths[row] - layer.sliding_window + 1):
                        raise RuntimeError(
                            f"layer {index} has already dropped tokens that a crop of {-tokens_to_remove} would need "
                            f"again (sliding window {layer.sliding_window}); call activate_past_recording() on the "
                            "cache before it fills"
                        )
        self.lengths, self.columns, self.real = lengths, columns, _unless_all(real)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, given {repeats}")
        self._take([row for row in range(len(self.lengths)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor | Sequence[int] | Sequence[bool]) -> None:
        """Keep the rows `indices` (numbers, or one bool a row), in that order; with none, the cache is empty again."""
        if self.lengths:
            given = indices.cpu() if isinstance(indices, Tensor) else list(indices)
            self._take(torch.arange(len(self.lengths), device="cpu")[given].tolist())

    def _take(self, sources: list[int]) -> None:
        if sources == list(range(len(self.lengths))):
            return
        if not sources:
            self.reset()
            return
        decoded, tables, moves = self.decoded, Tables(), []
        for index, layer in enumerate(self.layers):
            for rows, rank, slot in zip(decoded.schedule[index], decoded.ranks[index], layer.slots, strict=True):
                moves.append((slot, [rank[s] for s in sources if rank[s] >= 0], [self.lengths[r] for r in rows]))
                slot.announce_take(*moves[-1][1:], tables)
        for slot, *move in moves:
            slot.take(*move, tables)
        self.fix(self.plan[sources], self.decided_by)
        self.lengths = [self.lengths[s] for s in sources]
        self.real = None if self.real is None else _unless_all(self.real[sources])

    def __deepcopy__(self, memo: dict) -> RoutedCache:
        # All of it but the policy, which may hold a model's routers, and what is never changed.
        twin = memo[id(self)] = object.__new__(type(self))
        shared = ("decided_by", "tally", "model")
        twin.__dict__ = {k: v if k in shared else copy.deepcopy(v, memo) for k, v in self.__dict__.items()}
        return twin


def check_convertible(cache: object) -> None:
    """Raise unless `cache` is an empty `DynamicCache` of plain attention layers."""
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values must be a transformers Cache or None, given {type(cache).__name__}")
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    plain = type(cache) is DynamicCache and all(type(layer) in known for layer in cache.layers)
    if not plain or cache.layer_class_to_replicate not in (None, DynamicLayer):
        kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", [])})
        raise NotImplementedError(
            f"dynamic routing supports DynamicCache with full or sliding-window attention layers, given "
            f"{type(cache).__name__}{f' of {kinds}' if kinds else ''}; leave cache_implementation unset, or run the "
            "dense model inside `with model.routing.disabled():`"
        )
    if cache.offloading:
        raise NotImplementedError("dynamic routing does not support an offloaded cache; use a plain DynamicCache")
    if any(layer.is_initialized and layer.keys.numel() for layer in cache.layers):
        raise ValueError(
            "this cache was filled by the dense model (or by a prefix-tuning adapter), so its rows have no layer path; "
            "start with an empty cache, or stay dense inside `with model.routing.disabled():`"
        )


def _unless_all(real: Tensor | None) -> Tensor | None:
    # Without padding no mask is needed, and None says so.
    return None if real is None or bool(real.all()) else real
