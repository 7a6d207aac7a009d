"""The layer paths that a policy chooses for prompts, without answering them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from drllm_fast.decoder import decoder_of, unwrap
from drllm_fast.enable import disable_dynamic_routing, enable_dynamic_routing
from drllm_fast.influence import evaluating
from drllm_fast.settings import changed


def route_paths(
    model: nn.Module, prompts: Sequence[Sequence[int]], policy: object, *, max_tokens: int = 8192
) -> Tensor:
    """int8 [N, L] on the CPU: the path that `policy` gives each of N prompts, lists of token ids.

    model       a causal language model from transformers, routed or not; it is left as it was
    policy      what `enable_dynamic_routing` takes
    max_tokens  of a forward; prompts of like lengths share one, and none shares its rows with another

    Paths depend on a prompt's own tokens alone. Raises ValueError for a prompt without tokens, and what
    `enable_dynamic_routing` raises.
    """
    batches = prompt_batches(prompts, max_tokens)
    decoder = decoder_of(unwrap(model))
    device = decoder.get_input_embeddings().weight.device
    plans = torch.empty(len(prompts), len(decoder.layers), dtype=torch.int8, device="cpu")
    with routed_by(model, policy), evaluating(decoder), torch.inference_mode():
        for group, batch in batches:
            decoder(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
            plans[group] = decoder._drllm_routing.plan
    return plans


def prompt_batches(prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Forwards that read all prompts once: the numbers of the prompts, in the order of their rows, and `input_ids` and
    `attention_mask` [B, S] on the CPU, padded on the right. Groups as `token_groups` makes them.

    Raises ValueError at once for a prompt without tokens or a max_tokens below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    empty = [number for number, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ValueError(f"prompts {empty[:8]} have no tokens; give at least one token, such as the tokenizer's bos")
    return (
        (group, _padded([prompts[i] for i in group]))
        for group in token_groups([len(prompt) for prompt in prompts], max_tokens)
    )


def _padded(prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.as_tensor(prompt)
        mask[row, : len(prompt)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def token_groups(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Numbers of prompts that go into one forward of at most max_tokens tokens (or of one longer prompt), longest
    first: what does not fit into memory shows at once."""
    groups: list[list[int]] = []
    held = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or held + lengths[i] > max_tokens:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += lengths[i]
    return groups


@contextmanager
def routed_by(model: nn.Module, policy: object) -> Any:
    """Inside, the model is routed by `policy` and nothing else, whatever `using`, `disabled` or `context` holds around
    it; afterwards it is as it was, routed by its own policy or not at all."""
    top = unwrap(model)
    routing = getattr(decoder_of(top), "_drllm_routing", None)
    if routing is None:
        enable_dynamic_routing(top, policy)
        try:
            yield
        finally:
            disable_dynamic_routing(top)
        return
    own, last = routing.policy, routing.last
    routing.policy = policy
    try:
        with changed(routing, disabled=False, plan=None, context=None):
            yield
    finally:
        routing.policy, routing.last = own, last
