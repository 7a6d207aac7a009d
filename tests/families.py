"""Tiny random models of the families that the package promises to route exactly."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS = 4
COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 7}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 7, "head_dim": 8},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2, **SLIDING},
    "qwen3": {"head_dim": 8},
    # eager: before 5.23 its sdpa left the soft cap out, here it is always applied
    "gemma2": {"attn_implementation": "eager", "head_dim": 8, "query_pre_attn_scalar": 8, **SLIDING},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, **SLIDING},
    "olmo2": {},
    "phi3": {"sliding_window": 7},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, **SLIDING},
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3},
    "starcoder2": {"sliding_window": 7},
    "mixtral": {**MOE, "sliding_window": 7},
    "qwen3_moe": {**MOE, "head_dim": 8},
    "gpt_neox": {"rotary_pct": 0.5},
    "cohere2": {"head_dim": 8, **SLIDING},
    "glm4": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "gpt_oss": {**MOE, "head_dim": 8, **SLIDING},
}


def tiny(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model of the family, 4 layers."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    torch.manual_seed(seed)
    return randomise(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())


@torch.no_grad()
def randomise(model):
    """Weights large enough for layers to matter and logits to be told apart."""
    for name, p in model.named_parameters():
        if "sinks" in name:
            p.normal_(0, 1)
        elif p.ndim >= 2:
            p.normal_(0, 0.25)
        elif "norm" in name:
            p.add_(torch.randn_like(p) * 0.1)
        elif "bias" not in name:  # whatever else a family learns
            p.normal_(0, 1)
    return model


def prompts(lengths, vocab: int = 97, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab, (n,), generator=generator) for n in lengths]
