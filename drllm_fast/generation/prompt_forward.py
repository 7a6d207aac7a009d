"""The forward that reads prompts: packed by tokens, paths decided on the way, keys and values of every visit kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drllm_fast.active import ACTIVE
from drllm_fast.attention import NO_MASK
from drllm_fast.base_forward import name_of_cache
from drllm_fast.cache import RoutedCache
from drllm_fast.executor import RoutedForward
from drllm_fast.packed import PackedRows
from drllm_fast.policies import RoutingPolicy


class EngineCache(RoutedCache):
    """What a forward of the engine gives the model as its cache: it hands keys and values on to that forward."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        ACTIVE.get().store(self, key_states, value_states)
        return key_states, value_states


class PromptForward(RoutedForward):
    """As any routed forward; after it `kept[layer][number]` are the keys and values of each visit, of `schedule`'s rows
    end to end, and `plan` [B, L] the paths."""

    takes_base = True  # the base model's forward is run as it is, on packed tokens (`swap.routed_base`)

    def __init__(self, owner: object, packed: PackedRows, num_layers: int, policy: RoutingPolicy):
        nowhere = [0] * packed.batch
        super().__init__(owner, packed, nowhere, num_layers, None, policy, packed.lengths)
        self.kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_layers)]

    def run_base(self, forward: Callable[..., Any], **kwargs) -> Any:
        return forward(**kwargs)

    def store(self, cache: object, keys: Tensor, values: Tensor) -> None:
        self.kept[self.visit.layer].append((keys, values))
        self.visit.keys, self.visit.values = keys, values

    def _checked(self, out: object) -> Tensor:
        out = super()._checked(out)
        if self.visit.keys is None:
            raise NotImplementedError(
                f"layer {self.visit.layer} of this model stores no keys of its own (shared KV); call "
                "model.disable_dynamic_routing()"
            )
        return out


def read_prompts(
    model: nn.Module,
    cache: EngineCache,
    owner: object,
    prompts: Sequence[Sequence[int]],
    num_layers: int,
    policy: RoutingPolicy,
    device: torch.device,
) -> tuple[PromptForward, Tensor]:
    """Run prompts, lists of token ids, in one forward of the routed `model`; the logits [B, V] after each."""
    packed = PackedRows([len(prompt) for prompt in prompts], device)
    past = [0] * packed.batch
    packed.announce_positions(past)
    run = PromptForward(owner, packed, num_layers, policy)
    ids = torch.tensor([token for prompt in prompts for token in prompt], device="cpu")
    ids = ids.to(device, non_blocking=True)
    run.input_ids = ids
    last = torch.tensor(packed.offsets[1:], device="cpu").sub_(1).to(device, non_blocking=True)
    logits = run_model(model, run, cache, ids, packed.positions(past), last)
    if len(logits) != packed.batch:  # a model without `logits_to_keep` gives all of them
        logits = logits.index_select(0, last)
    return run, logits


def run_model(model: nn.Module, run: object, cache: EngineCache, ids: Tensor, positions: Tensor, keep: Any) -> Tensor:
    """Logits [n, V] of ids [T] at positions [1, T], of the tokens `keep` (0 for all), with `run` as the forward."""
    token = ACTIVE.set(run)
    try:
        return model(
            input_ids=ids.unsqueeze(0),
            attention_mask=torch.empty(NO_MASK, dtype=torch.bool, device=ids.device),
            position_ids=positions,
            use_cache=True,
            logits_to_keep=keep,
            return_dict=True,
            **{name_of_cache(type(model).forward): cache},
        ).logits[0]
    finally:
        ACTIVE.reset(token)
