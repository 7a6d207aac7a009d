"""Budgets between two penalties, so that figures of different routers can be compared at the same number of visits.

The share of visits is a step function of the penalty, and few prompts seldom meet a budget. A figure at the budget is
therefore read off the line between two penalties, one that keeps a little more and one that keeps a little less: it is
the mean figure of a service that takes one or the other at random, so as to keep the budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST = 0.25  # logits to both sides, in the search for an interval that holds the budget
DOUBLINGS = 12
HALVINGS = 8
TOLERANCE = 0.002  # an interval of shares as narrow as this is not halved


@dataclass
class Bracket:
    """Of K budgets. penalties fp64 [K, 2], the lower one, that keeps more, first; plans int8 [K, 2, N, L]."""

    budgets: Tensor
    penalties: Tensor
    plans: Tensor

    @property
    def shares(self) -> Tensor:
        """fp64 [K, 2]"""
        return self.plans.double().mean((2, 3))

    @property
    def weights(self) -> Tensor:
        """fp64 [K, 2]: how much of each end makes the budget; all of the nearer one where it is not between them."""
        more, less = self.shares.T
        width = more - less
        first = torch.where(width > 0, (self.budgets - less) / width.where(width > 0, 1), 0.5).clamp(0, 1)
        return torch.stack([first, 1 - first], 1)

    def at_budget(self, values: Tensor) -> Tensor:
        """fp64 [K] from what the two ends have, [K, 2]."""
        return (self.weights * values).sum(1)


def bracket(plans_at: Callable[[Tensor], Tensor], budgets: Tensor, start: Tensor) -> Bracket:
    """For each of the budgets, fp64 [K], two penalties as near to each other as `HALVINGS` allow.

    plans_at  the paths int8 [K, N, L] of N prompts at penalties fp64 [K], one for each budget
    start     fp64 [K], where to look first

    A budget that no penalty within reach keeps has an end that comes nearest to it.
    """

    def shares(plans: Tensor) -> Tensor:
        return plans.double().mean((1, 2))

    first = plans_at(start)
    ends = [(start.clone(), first.clone()), (start.clone(), first.clone())]  # keeps more, keeps less
    for doubling in range(DOUBLINGS):
        outside = torch.stack([shares(ends[0][1]) < budgets, shares(ends[1][1]) > budgets])
        if not outside.any():
            break
        step = FIRST * 2.0**doubling
        tried = torch.where(outside[0], ends[0][0] - step, ends[1][0] + step)
        plans = plans_at(tried)
        # What was the end on one side bounds the budget on the other side.
        for side in (0, 1):
            ends[1 - side] = _moved(ends[1 - side], *ends[side], outside[side])
            ends[side] = _moved(ends[side], tried, plans, outside[side])
    for _ in range(HALVINGS):
        wide = shares(ends[0][1]) - shares(ends[1][1]) > TOLERANCE
        if not wide.any():
            break
        middle = (ends[0][0] + ends[1][0]) / 2
        plans = plans_at(middle)
        more = shares(plans) >= budgets
        ends[0] = _moved(ends[0], middle, plans, wide & more)
        ends[1] = _moved(ends[1], middle, plans, wide & ~more)
    penalties, found = zip(*ends, strict=True)
    return Bracket(budgets, torch.stack(penalties, 1), torch.stack(found, 1))


def _moved(end: tuple[Tensor, Tensor], penalties: Tensor, plans: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(where, penalties, end[0]), torch.where(where[:, None, None], plans, end[1])
