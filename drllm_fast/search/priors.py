"""Which edits a search tries first: those of blocks that change the hidden state least.

With s_l the influence of block l (`drllm_fast.influence`) and m the median of all, the weight of an edit of block l is

    w_l = 2 m / (m + s_l)

between 0 and 2, and 1 at the median, whatever the criterion's unit. Skips and repeats have the same weight: a block
that changes little when it runs once changes little when it runs twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from torch import nn

from drllm_fast.influence import CRITERIA, influences
from drllm_fast.search.base import BlockWeights


def edit_prior(
    model: nn.Module,
    tokenizer: Callable[[str], Any],
    kind: str,
    *,
    texts: Iterable[str] | None = None,
    max_tokens: int = 2048,
) -> list[BlockWeights] | None:
    """L pairs (skip, repeat) of weights for `kind`, a criterion; None for the kind 'none'.

    The model must not be routed. `tokenizer`, `texts` and `max_tokens` are as for `influence.influences`, whose errors
    are raised. ValueError for another kind.
    """
    if kind == "none":
        return None
    if kind not in CRITERIA:
        raise ValueError(f"prior must be one of none, {', '.join(CRITERIA)}, got {kind!r}")
    scores = influences(model, tokenizer, texts, criterion=kind, max_tokens=max_tokens)
    return [(weight, weight) for weight in block_weights(scores)]


def block_weights(scores: list[float]) -> list[float]:
    """The formula above; 1 for a block without influence where the median has none."""
    scores = [max(score, 0.0) for score in scores]  # rounding puts CKA slightly below 0
    middle = median(scores)
    return [2 * middle / (middle + score) if middle + score > 0 else 1.0 for score in scores]
