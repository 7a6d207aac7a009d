"""Attention over packed rows, under a name of our own in Hugging Face's `AttentionInterface`.

No mask is ever built: each row attends causally to its own keys, where its KV slot keeps them.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from drllm_fast.active import ACTIVE
from drllm_fast.attention_ops import attention_has_kernel
from drllm_fast.attention_reference import attend_rows

PREFIX = "drllm_fast_"

# The shape of the mask that stands for none: 4D, so that it is passed on as it is and no time goes into making one.
NO_MASK = (1, 1, 1, 1)

# Keyword arguments that attention functions may be given and that change nothing here.
HARMLESS = frozenset(
    {"output_attentions", "output_hidden_states", "output_router_logits", "position_ids", "use_cache"}
    | {"past_key_values", "layer_past", "return_dict", "num_items_in_batch", "cache_position", "position_embeddings"}
    | {"logits_to_keep"}
)


def register(original: str) -> str:
    """Register routed attention over `original` ("sdpa", "eager", ...) and return its name.

    Outside a routed forward the name means `original`, masks included: a model that shares the config with a routed
    one, or a routed model that is switched off, computes what it always did.
    """
    name = PREFIX + original
    if name in ALL_ATTENTION_FUNCTIONS:
        return name

    def routed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
        forward = ACTIVE.get()
        if forward is None:
            return _original(original, module)(module, query, key, value, attention_mask, **kwargs)
        if attention_mask is not None and attention_mask.shape != NO_MASK:
            raise NotImplementedError(
                f"{type(module).__name__} makes a mask of its own, which dynamic routing does not support; call "
                "model.disable_dynamic_routing()"
            )
        return forward_attention(forward, module, query, key, value, **kwargs), None

    AttentionInterface.register(name, routed_attention)
    if original in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def _original(name: str, module: nn.Module):
    if name == "eager":  # not in the interface: each modelling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def forward_attention(
    forward,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> Tensor:
    """Attention of the visit that is running; query [1, H, T', D], the keys and values from the visit's KV slot."""
    if unknown := [name for name in kwargs.keys() - HARMLESS if kwargs[name] is not None]:
        raise NotImplementedError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, which dynamic routing does not "
            "support; run this model inside `with model.routing.disabled():`"
        )
    if is_causal is False:
        raise NotImplementedError("is_causal=False: a routed model attends causally; use `model.routing.disabled()`")
    key, value, rows = forward.attended(module, key, value)
    if dropout or not attention_has_kernel(query, key, value, s_aux):
        return attend_rows(
            query, key, value, *rows.segments(),
            scale=scaling, dropout=dropout, window=sliding_window, softcap=softcap, sinks=s_aux,
        )  # fmt: skip
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    layout, packed = rows.layout(query.device)
    return torch.ops.drllm_fast.ragged_attention(
        query[0].transpose(0, 1), key[0], value[0], *layout, scale, sliding_window, softcap, s_aux, packed
    ).unsqueeze(0)
