"""Prompts to train routers on, with what they are to choose."""

from __future__ import annotations

from dataclasses import dataclass

from drllm_fast.search.paths import LayerPath


@dataclass(frozen=True)
class Example:
    """One prompt of a training set.

    id, task, level   as in the search that found it; `task` and `level` make the groups of robust training
    tokens            the prompt as the model sees it, chat template included: what the routers read
    path              [L] the label, and the path that the frozen model runs while the windows are made
    targets           [L][3] probabilities of skip, execute and repeat to learn instead of `path`; None: one-hot of it
    """

    id: str
    task: str
    level: int | None
    tokens: tuple[int, ...]
    path: LayerPath
    targets: tuple[tuple[float, float, float], ...] | None = None
