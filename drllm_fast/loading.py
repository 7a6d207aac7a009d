"""Base model and routers together: a router checkpoint names the model that it was trained on."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from drllm_fast import smollm2
from drllm_fast.enable import enable_dynamic_routing
from drllm_fast.routers import LayerRouters


def from_pretrained(
    routers: str | os.PathLike[str] | LayerRouters,
    *,
    budget: float | None = None,
    base: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    **model_kwargs: Any,
) -> PreTrainedModel:
    """The base model of a router checkpoint, in evaluation mode and routed by it.

        model = drllm_fast.from_pretrained("my/routers", budget=0.9)
        tokenizer = drllm_fast.loading.tokenizer_for("my/routers")

    routers       a checkpoint (folder, bundled name or hub id), or LayerRouters
    budget        as for `enable_dynamic_routing`
    base          where the base model lies, if not where the checkpoint says: folder, bundled name or hub id
    dtype         "auto": the dtype of its files; of the bundled SmolLM2, whose own weights have 4 bits, bfloat16
    device_map    of transformers (a device's name, "auto", ...; needs accelerate); None is the CPU
    model_kwargs  further arguments of AutoModelForCausalLM.from_pretrained

    The routers are read first. Raises OSError for a checkpoint or a base model that cannot be had; ValueError for
    routers that name no base model, for a base model with other weights than theirs, and for contents that are no
    routers; TypeError for a model in place of its name; whatever `enable_dynamic_routing` raises.
    """
    routers = _read(routers)
    name, folder = _base(routers, base)
    if name == smollm2.NAME and dtype == "auto":
        dtype = torch.bfloat16
    model = _loaded(AutoModelForCausalLM, name, folder, dtype=dtype, device_map=device_map, **model_kwargs)
    if name == smollm2.NAME:
        model.name_or_path = model.config.name_or_path = name  # not the cache folder
    return enable_dynamic_routing(model.eval(), routers, budget=budget)


def tokenizer_for(
    routers: str | os.PathLike[str] | LayerRouters, *, base: str | os.PathLike[str] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a router checkpoint's base model, set to pad on the left; arguments and errors as above."""
    name, folder = _base(_read(routers), base)
    tokenizer = _loaded(AutoTokenizer, name, folder)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _read(routers: object) -> LayerRouters:
    if isinstance(routers, str | os.PathLike):
        return LayerRouters.from_pretrained(routers)
    if not isinstance(routers, LayerRouters):
        raise TypeError(
            f"routers must be a checkpoint (folder, bundled name or hub id) or LayerRouters, got "
            f"{type(routers).__name__}"
        )
    return routers


def _base(routers: LayerRouters, base: object) -> tuple[str, str]:
    """The base model's name, and where transformers finds it."""
    if base is None and routers.base_model is None:
        raise ValueError("these routers do not say which model they are for; give base=, its folder or hub id")
    if not isinstance(base, str | os.PathLike | None):
        raise TypeError(
            f"base must be a folder, bundled name or hub id, got {type(base).__name__}; a model that is loaded already "
            "is routed with drllm_fast.enable_dynamic_routing"
        )
    name = os.fspath(routers.base_model["name"] if base is None else base)
    if name.lower() == smollm2.NAME:
        return smollm2.NAME, str(smollm2.converted())
    return name, name


def _loaded(kind: Any, name: str, folder: str, **kwargs: Any) -> Any:
    try:
        return kind.from_pretrained(folder, **kwargs)
    except OSError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"the base model {name!r} of these routers cannot be loaded ({reason}). It must be a folder, an id on the "
            f"Hugging Face Hub or the bundled {smollm2.NAME}; say with base= where it lies"
        ) from error
