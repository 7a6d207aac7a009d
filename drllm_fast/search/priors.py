"""Which edits a search tries first: those of blocks that change the hidden state least.

With s_l the influence of block l (`drllm_fast.influence`) and m the median of all, the weight of an edit of block l is

    w_l = 2 m / (m + s_l)

between 0 and 2, and 1 at the median, whatever the criterion's unit. Skips and repeats have the same weight: a block
that changes little when it runs once changes little when it runs twice.

The kind 'kl' measures the edits instead: s_l is KL(dense || path) of the path with that one edit on the second half of
each text, and skips and repeats have weights of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch import nn

from drllm_fast.influence import CRITERIA, calibration_texts, influences
from drllm_fast.router_reference import REPEAT, SKIP
from drllm_fast.search.base import BlockWeights
from drllm_fast.search.evaluator import PathEvaluator
from drllm_fast.search.paths import dense_path

PRIORS = ("none", *CRITERIA, "kl")


def edit_prior(
    model: nn.Module,
    tokenizer: Callable[[str], Any],
    kind: str,
    *,
    texts: Iterable[str] | None = None,
    max_tokens: int = 2048,
) -> list[BlockWeights] | None:
    """L pairs (skip, repeat) of weights for `kind`, a criterion or 'kl'; None for the kind 'none'.

    The model must not be routed. `tokenizer`, `texts` and `max_tokens` are as for `influence.influences`, whose errors
    are raised. ValueError for another kind.
    """
    if kind == "none":
        return None
    if kind not in PRIORS:
        raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {kind!r}")
    if kind == "kl":
        skip, repeat = edit_divergences(model, tokenizer, calibration_texts() if texts is None else texts)
        return list(zip(block_weights(skip), block_weights(repeat), strict=True))
    scores = influences(model, tokenizer, texts, criterion=kind, max_tokens=max_tokens)
    return [(weight, weight) for weight in block_weights(scores)]


def edit_divergences(
    model: nn.Module, tokenizer: Any, texts: Iterable[str], *, max_tokens: int = 256
) -> tuple[list[float], list[float]]:
    """KL(dense || path), in nats a token, of skipping each block, and of repeating it: the mean over the texts, each
    cut to max_tokens words, of the tokens in its second half."""
    evaluator = PathEvaluator(model, tokenizer, store_bytes=0)
    layers = evaluator.num_layers
    dense = dense_path(layers)
    paths = [dense[:block] + (times,) + dense[block + 1 :] for times in (SKIP, REPEAT) for block in range(layers)]
    requests = []
    for text in texts:
        words = text.split()[:max_tokens]
        half = len(words) // 2
        requests.append((" ".join(words[:half]), [" " + " ".join(words[half:])], paths))
    found = torch.stack([kl for _, kl in evaluator.measure_many(requests)]).mean(dim=0).tolist()
    return found[:layers], found[layers:]


def block_weights(scores: list[float]) -> list[float]:
    """The formula above; 1 for a block without influence where the median has none."""
    scores = [max(score, 0.0) for score in scores]  # rounding puts CKA slightly below 0
    middle = median(scores)
    return [2 * middle / (middle + score) if middle + score > 0 else 1.0 for score in scores]
