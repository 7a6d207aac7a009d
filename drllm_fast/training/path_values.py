"""What layer paths are worth for items, as `drllm_fast.search.rewards` has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drllm_fast.search.evaluator import PathEvaluator
from drllm_fast.search.tokens import encode_context, encode_pair
from drllm_fast.search.unit import Item


class PathValues:
    """Values of paths of the items.

    tokens  of each item's prompt: what the routers read
    reward  "kl", "margin" or "loglik"

    Raises ValueError for items that have nothing to compute the reward from, or are too long for the model.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, items: Sequence[Item], reward: str, *, max_tokens: int = 8192):
        self.items, self.reward = items, reward
        self.evaluator = PathEvaluator(model, tokenizer, max_tokens=max_tokens)
        self.choices = [item.choices or (f" {item.answer}",) for item in items]
        for item in items:
            if reward == "margin" and len(item.choices or ()) < 2:
                raise ValueError(
                    f"the reward margin compares choices, and item {item.id} of {item.task} has "
                    f"{len(item.choices or ()) or 'none'}; use kl or loglik"
                )
        self.tokens = [encode_context(tokenizer, item.prompt, choices=item.choices is not None) for item in items]
        limit = self.evaluator.positions
        for item, choices in zip(items, self.choices, strict=True):
            longest = max(sum(map(len, encode_pair(tokenizer, item.prompt, choice))) for choice in choices)
            if limit is not None and longest > limit:
                raise ValueError(
                    f"item {item.id} of {item.task} has {longest} tokens with its answer, the model {limit} positions; "
                    "leave it out, or shorten it"
                )

    def __call__(self, numbers: Sequence[int], paths: Tensor) -> Tensor:
        """fp64 [n, P] of P paths, integers [n, P, L], for each of the items with these numbers.

        The same call gives the same values bit by bit: it uses nothing that an earlier one has kept. Raises
        FloatingPointError, naming item and path, for a value that is not finite.
        """
        self.evaluator.store.clear()
        requests = [(self.items[n].prompt, self.choices[n], of_item) for n, of_item in zip(numbers, paths, strict=True)]
        if self.reward == "kl":
            values = torch.stack([-kl for _, kl in self.evaluator.measure_many(requests)])
        else:
            scored = self.evaluator.score_many(requests)
            values = torch.stack([self._value(self.items[n], s) for n, s in zip(numbers, scored, strict=True)])
        if not values.isfinite().all():
            row, path = (~values.isfinite()).nonzero()[0].tolist()
            item = self.items[numbers[row]]
            raise FloatingPointError(
                f"the {self.reward} of item {item.id} of {item.task} is {values[row, path].item()} under the path "
                f"{paths[row, path].tolist()}; look for NaN in the model's weights, and use bfloat16 or float32 if "
                "float16 overflows. The routers are as they were"
            )
        return values.double()

    def _value(self, item: Item, scores: Tensor) -> Tensor:
        """[P] from the log-likelihoods [P, C] of an item's choices."""
        right = 0 if item.choices is None else int(item.answer)
        if self.reward == "loglik":
            return scores[:, right]
        others = [choice for choice in range(scores.shape[1]) if choice != right]
        return scores[:, right] - scores[:, others].amax(1)
