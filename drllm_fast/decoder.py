"""Finding the decoder of a transformers model, and whether its layers can be routed."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

ROUTABLE_LAYERS = ("full_attention", "sliding_attention")


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, out of a torch.compile or a PEFT wrapper."""
    model = getattr(model, "_orig_mod", model)
    inner = (
        model.get_base_model() if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model") else model
    )
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"expected a transformers PreTrainedModel (or a PEFT model of one), given {type(model).__name__}"
        )
    return inner


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """The module that holds the list of decoder `layers`. NotImplementedError if there is none."""
    top = unwrap(model)
    decoder = top.get_decoder() if hasattr(top, "get_decoder") else top
    layers = getattr(decoder, "layers", None)
    if not isinstance(decoder, PreTrainedModel) or not isinstance(layers, nn.ModuleList) or not len(layers):
        raise _cannot(top, "its decoder has no list of `layers`")
    return decoder


def _cannot(model: nn.Module, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"{type(model).__name__} cannot be routed: {reason}. Supported are decoder-only models whose decoder "
        "layers sit in `layers`, attend through transformers' AttentionInterface, fully or with a sliding window, "
        "and keep their own keys and values (Llama, Mistral, Qwen, Gemma 2/3, Phi-3, OLMo, GPT-NeoX, ...)"
    )


def routable_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The module whose `layers` are routed. NotImplementedError, with the reason, if the model cannot be routed."""

    def refuse(reason: str):
        raise _cannot(model, reason)

    if model.config.is_encoder_decoder:
        refuse("it is an encoder-decoder")
    decoder = decoder_of(model)
    layers, config = decoder.layers, decoder.config
    if len(layers) != config.num_hidden_layers:
        refuse(f"it has {len(layers)} layers and a config of {config.num_hidden_layers}")
    if not getattr(config, "is_causal", True):
        refuse("its attention is bidirectional")
    kinds = set(getattr(config, "layer_types", None) or ()) - set(ROUTABLE_LAYERS)
    if kinds or getattr(config, "attention_chunk_size", None):
        refuse(f"it has layers of type {', '.join(sorted(kinds)) or 'chunked_attention'}")
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        refuse("its layers share keys and values")
    if getattr(config, "kv_lora_rank", None):
        refuse("its attention changes values between the cache and the attention (latent attention)")
    if "mrope_section" in str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)):
        refuse("its positions are three-dimensional (multimodal rotary embedding)")
    if decoder.config is not model.config and "token_type_ids" in inspect.signature(type(model).forward).parameters:
        refuse("its multimodal wrapper prepares masks of its own; route its text model")
    if not type(decoder)._can_set_attn_implementation():
        refuse("its attention does not go through the AttentionInterface")
    for index, layer in enumerate(layers):
        attention = [m for m in layer.modules() if getattr(m, "layer_idx", None) is not None and m is not layer]
        if not attention:
            refuse(f"layer {index} has no attention with a `layer_idx`")
        if any(not getattr(m, "is_causal", True) for m in attention):
            refuse(f"the attention of layer {index} is not causal")
        if any(getattr(m, "is_cross_attention", False) for m in attention):
            refuse(f"layer {index} has cross-attention")
    return decoder


def sliding_windows(decoder: nn.Module) -> list[int]:
    """The sliding window of each layer, 0 for full attention."""
    config = decoder.config
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None)
    return [
        window if kinds is None or kind == "sliding_attention" else 0 for kind in kinds or [None] * len(decoder.layers)
    ]


def row_positions(config: Any) -> int | None:
    """How many tokens a row may have. LongRoPE turns all rows of a forward otherwise as soon as one of them is longer
    than the original model's, so that only up to there a row does not depend on its company."""
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]  # one, or one for each type of layer
    limits = [rope.get("original_max_position_embeddings") for rope in kinds if rope.get("rope_type") == "longrope"]
    limits.append(getattr(config, "max_position_embeddings", None))
    return min((limit for limit in limits if limit is not None), default=None)


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens at which an answer ends: what the model's generation config and its tokenizer say."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    return ends | {t for t in (getattr(tokenizer, "eos_token_id", None),) if t is not None}
