"""Greedy decoding of the rows of a path tree: their keys and values become a routed cache, and from there every row is
a sequence of its own."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drllm_fast.base_forward import name_of_cache
from drllm_fast.cache import RoutedCache
from drllm_fast.decoder import end_tokens
from drllm_fast.policies import GivenPlan
from drllm_fast.search.path_tree import Prefix
from drllm_fast.tally import Tally


def fill_cache(cache: RoutedCache, decoder: nn.Module, leaves: Sequence[Prefix], lengths: Sequence[int]) -> None:
    """Put the prompts of `leaves`, whole paths with the keys and values of all their visits, into an empty cache; row b
    has lengths[b] tokens. Which columns of shorter rows are padding is not noted, since only `decode` sees this cache
    and a row's new token is real."""
    plan = torch.tensor([leaf.path for leaf in leaves], dtype=torch.int8, device="cpu")
    chains = [_chain(leaf) for leaf in leaves]
    cache.fix(plan, GivenPlan(plan))
    for layer, place in enumerate(cache.layers):
        for number, rows in enumerate(cache.schedule[layer]):
            if rows:
                pairs = [chains[row][layer].slots[number] for row in rows]
                keys, values = (torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True))
                place.slots[number].hold(keys, values, [lengths[row] for row in rows])
    cache.model = weakref.ref(decoder)
    nothing = [0] * len(cache.layers)  # no row ran by itself
    cache.tally = Tally(plan, list(lengths), list(lengths), nothing, nothing, cache.bytes_per_token(), forwards=1)
    cache.advance(list(lengths), max(lengths), None)


def _chain(leaf: Prefix) -> list[Prefix]:
    """The prefixes of a path, of 1 to L blocks."""
    chain, at = [], leaf
    while at.path:
        chain.append(at)
        at = at.parent
    return chain[::-1]


def decode(
    model: nn.Module, tokenizer: Any, cache: RoutedCache, logits: Tensor, max_new_tokens: int, stop: Sequence[str]
) -> list[list[int]]:
    """The greedy answers of the cache's rows, of which `logits` [rows, V] predict the first tokens. A row leaves the
    batch when it has ended."""
    ends = end_tokens(model, tokenizer)
    answers: list[list[int]] = [[] for _ in range(len(logits))]
    running = list(range(len(logits)))
    given = name_of_cache(type(model).forward)
    for step in range(max_new_tokens):
        tokens = logits.argmax(-1)
        going = []
        for at, (row, token) in enumerate(zip(running, tokens.tolist(), strict=True)):
            if token in ends:
                continue
            answers[row].append(token)
            if not stop or not _stopped(tokenizer.decode(answers[row]), stop):
                going.append(at)
        if not going or step + 1 == max_new_tokens:
            break
        if len(going) < len(running):
            running = [running[at] for at in going]
            tokens = tokens[torch.tensor(going, device=tokens.device)]
            cache.batch_select_indices(going)
        logits = model(input_ids=tokens.unsqueeze(1), use_cache=True, return_dict=True, **{given: cache}).logits[:, -1]
    return answers


def _stopped(text: str, stop: Sequence[str]) -> bool:
    return any(end in text for end in stop)
