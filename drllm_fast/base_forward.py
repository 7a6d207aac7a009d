"""The first seam: the base model's forward packs, runs Hugging Face's own on the packed tokens, and unpacks."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from drllm_fast.active import ACTIVE
from drllm_fast.attention import NO_MASK
from drllm_fast.cache import RoutedCache
from drllm_fast.executor import RoutedForward
from drllm_fast.inputs import check_dense_cache, check_inputs, check_kept_plan, one_input, real_columns
from drllm_fast.packed import PackedBatch
from drllm_fast.settings import Settings, current, take_mark
from drllm_fast.tally import Tally

if TYPE_CHECKING:
    from drllm_fast.routing import Routing


def base_forward(
    routing: Routing,
    base: nn.Module,
    dense: Callable,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: DynamicCache | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs,
):
    """The base model's own forward, `dense`, on packed tokens and routed layers. Arguments and result as there."""
    settings, own = current(routing), take_mark(routing)
    cache_argument = name_of_cache(dense)
    if cache_argument in kwargs:
        past_key_values = kwargs.pop(cache_argument)
    if settings.disabled:
        check_dense_cache(past_key_values)
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            cache_argument: past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache,
        }  # fmt: skip
        token = ACTIVE.set(None)
        try:
            return dense(**given, **kwargs)
        finally:
            ACTIVE.reset(token)

    as_dict = kwargs.pop("return_dict", None)
    as_dict = getattr(base.config, "return_dict", True) if as_dict is None else as_dict
    x = one_input(input_ids, inputs_embeds)
    check_inputs(base, routing.attention, x, attention_mask, position_ids, past_key_values, kwargs)
    use_cache = base.config.use_cache if use_cache is None else use_cache
    cache = past_key_values
    fresh = not isinstance(cache, RoutedCache)
    if cache is None and use_cache:
        cache = RoutedCache(base.config)
    past_columns = 0 if fresh or cache is None else cache.columns

    batch, columns = x.shape[:2]
    past = cache.lengths if past_columns else [0] * batch
    if len(past) != batch:
        raise ValueError(f"the cache holds {len(past)} rows, the input has {batch}")
    if past_columns and cache.model is not None and cache.model() is not base:
        raise ValueError("this cache was filled by another model; start with a new cache")
    real = real_columns(attention_mask, batch, columns, None if fresh else cache)
    packed = PackedBatch(real, batch, columns, x.device)
    counted = position_ids is None or (own and settings.count_positions)
    if counted:
        packed.announce_positions(past)

    undo = None
    if past_columns:
        check_kept_plan(settings, cache)
        policy, prompt_lengths = None, packed.lengths
    else:
        policy = settings.plan or routing.policy
        prompt_lengths = prompt_lengths_of(settings, packed, real, own)
        if past_key_values is not None and fresh:
            undo = RoutedCache.convert(cache, routing.num_layers)
    run = RoutedForward(routing, packed, past, routing.num_layers, cache, policy, prompt_lengths)
    token = ACTIVE.set(run)
    try:
        ids = None if input_ids is None else packed.pack(input_ids)
        run.input_ids = None if ids is None else ids[0]
        outputs = dense(
            input_ids=ids,
            attention_mask=_no_mask(x.device),
            position_ids=(
                packed.positions(past) if counted else packed.pack(position_ids.expand(batch, -1)[:, -columns:])
            ),
            inputs_embeds=None if inputs_embeds is None else packed.pack(inputs_embeds),
            use_cache=use_cache,
            return_dict=True,
            **{cache_argument: cache},
            **kwargs,
        )
    except BaseException:
        if undo is not None:
            undo()
        elif cache is not None and not past_columns:
            cache.reset()
        raise
    finally:
        ACTIVE.reset(token)

    if cache is not None:
        if not past_columns:
            cache.fix(run.plan, policy)
            cache.model = weakref.ref(base)
        cache.advance(packed.lengths, columns, real)
    routing.last = Tally.of(run, cache, continued=bool(past_columns))
    outputs = _unpacked(outputs, packed)
    return outputs if as_dict else outputs.to_tuple()


@functools.cache
def name_of_cache(forward: Callable) -> str:
    """What a model's forward calls its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def prompt_lengths_of(settings: Settings, packed: PackedBatch, real: Tensor | None, own: bool) -> list[int]:
    """How many tokens of each row the policy may see. `own`: the forward is one that `generate` prepared."""
    if 0 in packed.lengths:
        row = packed.lengths.index(0)
        raise ValueError(f"row {row} has no tokens: its attention_mask is all zeros; remove the row")
    if settings.context is not None:
        lengths = settings.context
        if packed.batch % len(lengths):
            raise ValueError(f"{len(lengths)} context lengths for a batch of {packed.batch} rows; give one for each")
        lengths = [n for n in lengths for _ in range(packed.batch // len(lengths))]
        for row, (given, length) in enumerate(zip(lengths, packed.lengths, strict=True)):
            if given > length:
                raise ValueError(f"context length {given} of row {row} exceeds its {length} tokens")
        return lengths
    columns = settings.prompt_columns if own else None
    if columns is None or columns >= packed.columns:
        return packed.lengths
    return [columns] * packed.batch if real is None else real[:, :columns].sum(1).tolist()


def _no_mask(device: torch.device) -> Tensor:
    return torch.empty(NO_MASK, dtype=torch.bool, device=device)


def _unpacked(outputs, packed: PackedBatch):
    for name in ("last_hidden_state", "hidden_states"):
        value = outputs.get(name)
        if isinstance(value, Tensor):
            outputs[name] = packed.unpack(value)
        elif value is not None:
            outputs[name] = tuple(None if h is None else packed.unpack(h) for h in value)
    return outputs
