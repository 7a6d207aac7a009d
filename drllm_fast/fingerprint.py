"""Telling whether a model is the one that routers were trained on, without storing its weights.

A fingerprint is a small dict, fit for JSON:

    structure  model type, numbers of layers and heads, hidden and vocabulary size; compared exactly
    embedding  256 entries of the input embedding
    norms      for each layer the first entries of its one-dimensional norm weights

Embeddings and norms are what quantisation of linear layers leaves alone, so the samples are the same in fp32, bf16 and
fp16 and with int8 linear layers. What they cannot show follows from that: a model whose linear layers alone were
changed, a merged LoRA adapter for example, has the fingerprint of its base.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from drllm_fast.decoder import decoder_of, unwrap

EMBEDDING_ENTRIES = 256
NORM_ENTRIES = 4  # of each norm

# The relative L2 distance up to which two samples are of the same weights. Rounding moves an entry by at most 2^-8 of
# it in bf16 and 2^-11 in fp16, so two copies of the same weights are at most 2^-8 + 2^-11 = 0.0044 apart (measured for
# SmolLM2-135M, fp32 against bf16: 0.0014). Fine-tuned weights are usually 0.01 away or more, unrelated ones about 1.
TOLERANCE = 5e-3

ADAPTERS = ("lora_", "modules_to_save", "ln_tuning_")  # names of PEFT's own modules inside a layer


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """The fingerprint of a transformers model with decoder layers, routed or not, in a PEFT wrapper or not.

    Raises NotImplementedError for a model without a list of decoder layers, or whose weights cannot be read here
    (on the meta device, or an embedding that is itself quantised).
    """
    decoder = decoder_of(model)
    config = decoder.config
    embedding = decoder.get_input_embeddings().weight
    return {
        "structure": {
            "model_type": config.model_type,
            "num_layers": len(decoder.layers),
            "hidden_size": config.hidden_size,
            "vocab_size": embedding.shape[0],
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        },
        "embedding": _embedding_sample(embedding),
        "norms": [_norm_sample(layer) for layer in decoder.layers],
    }


def check(model: nn.Module, stored: dict[str, Any]) -> None:
    """ValueError, saying what differs, unless `model` has the weights that the fingerprint `stored` was taken of.

    Raises NotImplementedError where `fingerprint` does.
    """
    own = fingerprint(model)
    try:
        structure = dict(stored["structure"])
        parts = {
            "input embedding": (own["embedding"], [float(x) for x in stored["embedding"]]),
            "norm weights": (_flat(own["norms"]), [float(x) for x in _flat(stored["norms"])]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a fingerprint: {stored!r:.80}; expected what fingerprint(model) returns") from error
    unlike = [
        f"its {name} is {own['structure'].get(name)}, not {structure.get(name)}"
        for name in (own["structure"] | structure)
        if own["structure"].get(name) != structure.get(name)
    ]
    if not unlike:  # samples are comparable only between models of one structure
        for part, (given, expected) in parts.items():
            if len(given) != len(expected):
                unlike.append(f"the sample of its {part} has {len(given)} entries, not {len(expected)}")
            elif not (distance := _relative_distance(given, expected)) <= TOLERANCE:  # NaN is a difference, too
                unlike.append(f"its {part}: relative L2 distance {distance:.2g}, at most {TOLERANCE:g} is allowed")
    if unlike:
        raise ValueError(f"{type(unwrap(model)).__name__} is not the model of the fingerprint: {'; '.join(unlike)}")


def _embedding_sample(weight: Tensor) -> list[float]:
    # Rows grow with the square of the index: tokenizers give small ids to frequent tokens, which training moves most.
    index = torch.arange(EMBEDDING_ENTRIES)
    rows = weight.shape[0] * index.square() // EMBEDDING_ENTRIES**2
    columns = 7919 * index % weight.shape[1]
    _readable("input embedding", weight)
    return _rounded(weight.detach()[rows.to(weight.device), columns.to(weight.device)])


def _norm_sample(layer: nn.Module) -> list[float]:
    sample: list[float] = []
    for name, module in sorted(layer.named_modules()):
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.ndim == 1:
            if not any(adapter in name for adapter in ADAPTERS):
                _readable(f"norm {name}", weight)
                sample += _rounded(weight.detach()[:NORM_ENTRIES])
    return sample


def _readable(what: str, weight: Tensor) -> None:
    if weight.is_meta or not weight.is_floating_point():
        where = "on the meta device (offloaded, or not loaded)" if weight.is_meta else f"of dtype {weight.dtype}"
        raise NotImplementedError(
            f"the {what} is {where}, so the model cannot be identified; load it with floating-point weights, or set "
            "base_model to None on the routers to use them unchecked"
        )


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.float().tolist()]


def _flat(norms: list[list[float]]) -> list[float]:
    return [value for layer in norms for value in layer]


def _relative_distance(a: list[float], b: list[float]) -> float:
    """|a - b| / max(|a|, |b|), 0 where both are 0."""
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    scale = max(float(x.norm()), float(y.norm()))
    return float((x - y).norm()) / scale if scale else float((x - y).norm())
