"""One routed forward: every row of the batch runs its own list of blocks, tokens are never padded.

ids [B, S] + mask --pack--> ids [1, T]
   Hugging Face's own base-model forward runs its own loop of layers on the packed tokens
      at each layer:  the policy decides (prefill only) -> rows with 0, 1, 2
         visit 1: gather rows with >= 1 -> the layer's own forward -> scatter
         visit 2: gather rows with 2    -> the layer's own forward -> scatter
hidden [1, T, d] --unpack--> [B, S, d]
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor, nn

from drllm_fast.cache import RoutedCache
from drllm_fast.key_rows import KeyRows, layout_tables
from drllm_fast.kv_slot import KVSlot
from drllm_fast.packed import PackedRows, RowSet
from drllm_fast.policies import PromptBatch, RoutingPolicy, check_decisions


class Visit:
    """One application of a block: `number` 0 or 1 of `layer`, by `rows`, which have run `past` tokens before."""

    __slots__ = ("layer", "number", "rows", "past", "slot", "keys", "values", "attended")

    def __init__(self, layer: int, number: int, rows: RowSet, past: list[int]):
        self.layer, self.number, self.rows, self.past = layer, number, rows, past
        self.slot: KVSlot | None = None  # set by the cache, with what it was given
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.attended = False

    def offsets(self) -> list[int]:
        return [0, *accumulate(self.rows.lengths[:-1])]


class RoutedForward:
    """The state of one forward of the base model. A layer calls `run_layer`; the cache and the attention function
    find the visit that is running in `visit`."""

    takes_base = False  # `base_forward` packs and unpacks

    def __init__(
        self,
        owner: object,
        packed: PackedRows,
        past: list[int],
        num_layers: int,
        cache: RoutedCache | None,
        policy: RoutingPolicy | None,
        prompt_lengths: list[int],
    ):
        self.owner = owner  # the Routing whose layers this forward is for
        self.packed, self.past, self.cache = packed, past, cache
        self.policy = policy  # None once all paths are known
        self.prompt_lengths = prompt_lengths
        self.input_ids: Tensor | None = None  # [T], for the policy
        self.memory: dict = {}  # the policy's
        self.plan = (
            cache.plan if policy is None else torch.zeros(packed.batch, num_layers, dtype=torch.int8, device="cpu")
        )
        self._plan = None if policy is None else self.plan.numpy()  # the same memory
        self._heads: dict[torch.device, tuple[Tensor | None, Tensor, Tensor | None]] = {}
        self.schedule = cache.schedule if policy is None else [((), ())] * num_layers
        self.visit: Visit | None = None
        self._latest = -1  # the layer that ran last
        self.layer_rows, self.layer_tokens = [0] * num_layers, [0] * num_layers
        self._layouts: dict[tuple, tuple] = {}
        self._moved: dict[tuple, tuple[object, object]] = {}
        if packed.device.type != "cpu":
            if policy is None:
                self._announce(range(num_layers))
            else:
                packed.announce_heads(prompt_lengths)

    def run_layer(self, module: nn.Module, forward: Callable[..., Tensor], hidden: Tensor, *args, **kwargs) -> Tensor:
        """All visits of one block, `module`, whose own forward is `forward`: hidden [1, T, d] -> [1, T, d]."""
        layer = module._drllm_layer
        if layer <= self._latest:
            raise NotImplementedError(
                "this model runs a layer more than once a forward, or not in order, so that a layer path does not say "
                "what runs; call model.disable_dynamic_routing()"
            )
        self._latest = layer
        if self.policy is not None:
            self._decide(layer, hidden)
        for number, rows in enumerate(self.schedule[layer]):
            if not rows:
                break
            subset = self.packed.subset(rows, hidden.device)
            if subset.tokens == 0:  # rows that brought no token to this forward
                break
            if subset is self.packed.everything:
                self.visit = Visit(layer, number, subset, self.past)
                hidden = self._checked(forward(module, hidden, *args, **kwargs))
            else:
                self.visit = Visit(layer, number, subset, [self.past[r] for r in rows])
                args_here = [self._rows_of(a, subset) for a in args]
                kwargs_here = {k: self._rows_of(a, subset) for k, a in kwargs.items()}
                out = forward(module, subset.take(hidden), *args_here, **kwargs_here)
                hidden = subset.put(hidden, self._checked(out))
            self.layer_rows[layer] += len(rows)
            self.layer_tokens[layer] += subset.tokens
        return hidden

    def _decide(self, layer: int, hidden: Tensor) -> None:
        # Once a block, when the block before it has emptied the caches: a call into torch takes some 20 µs here.
        device = hidden.device
        if device not in self._heads:
            self._heads[device] = self._prompt_parts(device)
        index, cu_seqlens, ids = self._heads[device]
        hidden = hidden.squeeze(0) if index is None else hidden[0].index_select(0, index)
        rows, layers = self.packed.batch, len(self.schedule)
        prompts = PromptBatch(hidden, cu_seqlens, ids, self.memory)
        decisions = check_decisions(self.policy.route(layer, prompts), rows, layers, layer)
        if isinstance(decisions, Tensor):
            self.plan[:, layer:] = decisions[:, layer:]
            self.policy = None
            columns = self.plan[:, layer:].T.tolist()
        else:
            self._plan[:, layer] = decisions
            columns = [decisions]
        decided = range(layer, layer + len(columns))
        for at, column in zip(decided, columns, strict=True):
            once = tuple(r for r, d in enumerate(column) if d >= 1)
            self.schedule[at] = (once, tuple(r for r in once if column[r] == 2))
        if device.type != "cpu":
            self._announce(decided)

    def _prompt_parts(self, device: torch.device) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """For the policy: where the prompts' tokens lie (None: all are), their cu_seqlens, and their ids."""
        index, cu_seqlens = self.packed.heads(self.prompt_lengths, device)
        ids = self.input_ids
        return index, cu_seqlens, ids if index is None or ids is None else ids.index_select(0, index.to(ids.device))

    def _announce(self, layers: range) -> None:
        """What the visits of these layers will ask of `Tables`, so that one copy takes all of it to the device."""
        for layer in layers:
            for number, rows in enumerate(self.schedule[layer]):
                if not rows:
                    break
                self.packed.announce_subset(rows)
                new, past = [self.packed.lengths[r] for r in rows], [self.past[r] for r in rows]
                if not any(new):
                    break
                starts, total = [0, *accumulate(new[:-1])], new
                if self.cache is not None:
                    place = self.cache.layers[layer]
                    slot = place.slots[number]
                    slot.announce_write(past, new, place.keep, self.packed.tables)
                    if slot.keys is not None:
                        starts, total = slot.starts, slot.held(past, new)
                for table in layout_tables(new, starts, total):
                    self.packed.tables.add(*table)

    def store(self, cache: RoutedCache, keys: Tensor, values: Tensor) -> None:
        """The cache's update: keys and values [1, heads, T', head_dim] of the visit that is running."""
        visit = self.visit
        layer = cache.layers[visit.layer]
        slot = layer.slots[visit.number]
        visit.slot = slot.write(keys, values, visit.past, visit.rows.lengths, layer.keep, self.packed.tables)
        visit.keys, visit.values = keys, values

    def attended(self, module: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, KeyRows]:
        """The keys and values that the visit that is running attends to, and where those of its rows lie."""
        visit = self.visit
        visit.attended = True
        new, slot = visit.rows.lengths, visit.slot
        if slot is None:  # no cache: the keys are those of this forward
            return keys, values, self._key_rows(new, visit.offsets(), new)
        if keys is not visit.keys or values is not visit.values:
            raise NotImplementedError(
                f"{type(module).__name__} changes keys or values between the cache and the attention, which dynamic "
                "routing does not support; run this model inside `with model.routing.disabled():`"
            )
        return slot.keys, slot.values, self._key_rows(new, slot.starts, slot.held(visit.past, new))

    def _key_rows(self, new: list[int], starts: list[int], total: list[int]) -> KeyRows:
        return KeyRows(new, starts, total, self.packed.tables, self._layouts)

    def _rows_of(self, argument: object, subset: RowSet) -> object:
        """The part of a layer's argument that belongs to the subset's tokens; remembered, for layers share it."""
        if isinstance(argument, Tensor):
            if argument.ndim < 2 or argument.shape[1] != self.packed.tokens:
                return argument
            key = (id(argument), subset.rows, argument.device)
            if key not in self._moved:  # the argument is kept beside its part, or its id could be given away
                self._moved[key] = (argument, subset.take(argument))
            return self._moved[key][1]
        if isinstance(argument, tuple | list):
            return type(argument)(self._rows_of(a, subset) for a in argument)
        if isinstance(argument, dict):
            return {k: self._rows_of(a, subset) for k, a in argument.items()}
        return argument

    def _checked(self, out: object) -> Tensor:
        """A model outside the contract is found here, before its result is used."""
        if isinstance(out, Tensor) and self.visit.attended and (self.cache is None or self.visit.slot is not None):
            return out
        if not isinstance(out, Tensor):
            what = f"its layers return {type(out).__name__} instead of a tensor"
        elif not self.visit.attended:
            what = "its attention does not go through transformers' AttentionInterface"
        else:
            what = f"layer {self.visit.layer} stores no keys of its own (shared KV)"
        raise NotImplementedError(f"this model cannot be routed: {what}; call model.disable_dynamic_routing()")
