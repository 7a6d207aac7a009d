"""From measured paths to what routers are to learn: costs are fitted, blocks ordered, and paths of several lengths
chosen for each prompt to be read along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drllm_fast.influence import StaticPolicy
from drllm_fast.router_reference import EXECUTE, REPEAT, SKIP
from drllm_fast.training.examples import Example
from drllm_fast.training.orders import (
    Orders,
    PlaceObjective,
    balanced,
    find_orders,
    shared_order,
    spread_steps,
    supported,
)
from drllm_fast.training.prices import CostModel, Measurements, features
from drllm_fast.training.windows import pool_examples

STATIC_PROMPTS = 60  # of each group, for the order that all share


@dataclass
class Lesson:
    """examples   of each prompt as many as it has lengths, with the path to read it along
    places     fp32 [N, L, 2], the targets of `objective`
    static     the one order of blocks that is best for all prompts on the average, every group counting alike; None
               where none was sought
    about      for the report: how well costs were foretold, and the blocks that each group leaves out first
    """

    examples: list[Example]
    places: Tensor
    objective: PlaceObjective
    static: StaticPolicy | None
    about: dict[str, Any]


def price_lesson(
    model: nn.Module,
    measured: Measurements,
    *,
    skips: int = 9,
    repeats: int = 3,
    lengths: int = 3,
    least: int = 500,
    seed: int = 0,
    max_tokens: int = 8192,
    file: Path | None = None,
    progress: bool = True,
) -> Lesson:
    """What to teach routers of `model`, from paths measured on it.

    skips, repeats  the longest sequences of blocks to leave out, and to repeat
    lengths         paths of different lengths for each prompt
    least           examples of each group; one with fewer prompts is read along more lengths, and again if need be
    file            for the windows of the dense paths, see `pool_examples`

    Raises ValueError where measured paths have not left out, or repeated, enough blocks.
    """
    prompts, layers = len(measured.tokens), measured.paths.shape[1]
    if lengths > skips + repeats + 1:
        raise ValueError(f"lengths={lengths}, but there are only {skips + repeats + 1} lengths of path to choose from")
    dense = torch.full((prompts, layers), EXECUTE, dtype=torch.int8)
    windows = pool_examples(
        model,
        measured.tokens,
        dense,
        windows=1,
        max_tokens=max_tokens,
        dtype=torch.float32,
        file=file,
        progress=progress,
    )
    z = features(windows)
    cost, quality = CostModel.fit(z, measured, seed=seed, progress=progress)
    orders = find_orders(
        cost,
        z,
        skippable=supported(measured.paths, SKIP),
        repeatable=supported(measured.paths, REPEAT),
        skips=skips,
        repeats=repeats,
        progress=progress,
    )
    places = orders.places()
    everyone = balanced(measured.groups, STATIC_PROMPTS, seed)
    shared = shared_order(cost, z[everyone], skippable=supported(measured.paths, SKIP), skips=skips)
    static = StaticPolicy(shared.tolist(), num_layers=layers, budget=1.0, criterion="prices")
    rows, steps = spread_steps(measured.groups, skips=skips, repeats=repeats, each=lengths, least=least, seed=seed)
    firsts = {
        group: places[[i for i, name in enumerate(measured.groups) if name == group]][..., 0].mean(0)
        for group in sorted(set(measured.groups))
    }
    about = {
        "learnt": "places of blocks in the order in which they are best left out",
        "measured_paths": len(measured.costs),
        "cost_model_r2": quality,
        "left_out_first": {group: mean.argsort()[:skips].tolist() for group, mean in firsts.items()},
    }
    examples = along(measured.tokens, measured.groups, orders, rows, steps)
    return Lesson(examples, places[rows], PlaceObjective(skips, repeats), static, about)


def along(
    tokens: Sequence[tuple[int, ...]], groups: Sequence[str], orders: Orders, rows: Tensor, steps: Tensor
) -> list[Example]:
    """Prompts rows[m], by number, to be read along the path of steps[m] in their orders; groups are `task/level`."""
    examples = []
    for number, step, path in zip(rows.tolist(), steps.tolist(), orders.paths(rows, steps).tolist(), strict=True):
        task, _, level = groups[number].partition("/")
        examples.append(Example(f"{number}/{step}", task, int(level) if level else None, tokens[number], tuple(path)))
    return examples
