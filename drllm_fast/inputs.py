"""What a routed forward accepts. Everything else is refused here, before anything has changed."""

from __future__ import annotations

import torch
from torch import Tensor

from drllm_fast.cache import RoutedCache, check_convertible
from drllm_fast.settings import Settings


def one_input(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    x = input_ids if input_ids is not None else inputs_embeds
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"an empty batch of shape {tuple(x.shape)}")
    return x


def check_inputs(base, attention: str, x: Tensor, attention_mask, position_ids, cache, kwargs: dict) -> None:
    """Whatever would run and be silently wrong. Nothing has been changed yet."""
    if base.config._attn_implementation != attention:
        raise RuntimeError(
            f"the attention implementation was changed to {base.config._attn_implementation!r} while routing is "
            "on; call model.disable_dynamic_routing(), change it, and enable routing again"
        )
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise NotImplementedError(
            f"attention_mask of {shape} (from the caller, or made by the model's own wrapper): a routed model takes a "
            "mask [batch, columns] of ones and zeros (or none); custom 4D masks are not supported"
        )
    if position_ids is not None:
        if position_ids.ndim != 2:
            raise NotImplementedError(f"position_ids must be [batch, columns], given {tuple(position_ids.shape)}")
        if position_ids.shape[0] not in (1, x.shape[0]) or position_ids.shape[1] < x.shape[1]:
            raise ValueError(
                f"position_ids have shape {tuple(position_ids.shape)}, the input has {tuple(x.shape[:2])}; give one "
                "position for each column"
            )
    for name in ("output_attentions", "output_router_logits"):
        if kwargs.get(name, getattr(base.config, name, False)):
            raise NotImplementedError(f"{name}=True is not supported by a routed model; use `routing.disabled()`")
    if base.training and any(getattr(layer, "gradient_checkpointing", False) for layer in base.layers):
        raise NotImplementedError("gradient checkpointing is not supported while routing is on; disable one of them")
    packed = sorted({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "block_table", "cache"} & kwargs.keys())
    if any(kwargs[name] is not None for name in packed):
        raise NotImplementedError(
            f"{', '.join(packed)}: packed input and continuous batching are not supported by a routed model; give "
            "padded rows with an attention_mask (they are packed inside)"
        )
    if attention_mask is None and position_ids is not None and position_ids.shape[1] > 1:
        if bool((position_ids.diff(dim=1) != 1).any()):
            raise NotImplementedError(
                "position_ids that do not count up by one, without an attention_mask, mean packed sequences; give "
                "padded rows with an attention_mask instead (they are packed inside)"
            )
    per_token = [k for k, v in kwargs.items() if isinstance(v, Tensor) and v.shape[:2] == x.shape[:2] and v.ndim > 1]
    if per_token:
        raise NotImplementedError(f"{', '.join(per_token)}: per-token arguments are not supported by a routed model")
    if cache is not None and not isinstance(cache, RoutedCache):
        check_convertible(cache)


def real_columns(mask: Tensor | None, batch: int, columns: int, cache: RoutedCache | None) -> Tensor | None:
    """Which of the new columns are real: bool [B, S] on the CPU, or None when all are. Checks the part that the
    cache has seen."""
    past = 0 if cache is None else cache.columns
    if mask is None:
        if cache is not None and cache.real is not None and past:
            raise ValueError("the rows in the cache were padded: give the attention_mask of all columns, old and new")
        return None
    if mask.shape != (batch, past + columns):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, {past + columns}): one entry for each "
            f"of the {past} columns in the cache and of the {columns} new ones"
        )
    mask = mask.to(torch.bool).cpu()  # read once, and here
    if bool(mask.all()) and (cache is None or cache.real is None):
        return None
    if past:
        seen = mask[:, :past]
        if not (bool(seen.all()) if cache.real is None else torch.equal(seen, cache.real)):
            raise ValueError(
                "the attention_mask hides or shows other past columns than when they were run; the keys are in the "
                "cache already, so start with a new cache"
            )
        mask = mask[:, past:]
        if bool(mask.all()):
            return None
    return mask


def check_kept_plan(settings: Settings, cache: RoutedCache) -> None:
    """A plan that is forced on a filled cache must be the one the cache was filled under."""
    if settings.plan is None or settings.plan is cache.decided_by:
        return
    if not torch.equal(settings.plan.expand(len(cache.lengths)), cache.plan):
        raise ValueError(
            "routing.using(plan) was given another plan than the one this cache was filled under; a path is kept "
            "for as long as its cache is, so start with a new cache"
        )


def check_dense_cache(cache: object) -> None:
    """A cache for the dense model: an emptied routed one serves again, a filled one does not."""
    if not isinstance(cache, RoutedCache):
        return
    if cache.columns:
        raise ValueError(
            "this cache was filled by the routed model, and routing is switched off here; start with a new cache"
        )
    cache.revert()
