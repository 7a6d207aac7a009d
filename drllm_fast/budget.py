"""Budgets of routers: a penalty for each visit, found once on calibration prompts for each budget.

    decision = argmax over c of  logit_c - penalty * visits_c      visits (0, 1, 2) of skip, execute, repeat

which is argmax of log p_c - penalty * visits_c, for the softmax only shifts all logits alike. A budget is the mean
share of the dense model's visits over the calibration prompts; between two budgets of the table penalties are
interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np


@dataclass(frozen=True)
class BudgetTable:
    """budgets    shares of the dense visits, above 0 and up to 2, rising
    penalties  the penalty that keeps each of them, falling; below 0 where a budget is above what the routers choose
    source     what they were found on: prompts, groups, the shares that were measured; fit for JSON

    ValueError for anything else.
    """

    budgets: tuple[float, ...]
    penalties: tuple[float, ...]
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = [*self.budgets, *self.penalties]
        if not self.budgets or len(self.budgets) != len(self.penalties):
            raise ValueError(f"a budget table needs as many penalties as budgets, got {self.penalties}, {self.budgets}")
        if any(isinstance(x, bool) or not isinstance(x, Real) or not np.isfinite(x) for x in numbers):
            raise ValueError(f"a budget table holds finite numbers, got {numbers}")
        if not 0 < min(self.budgets) <= max(self.budgets) <= 2:
            raise ValueError(f"budgets are shares of the dense visits, above 0 and up to 2, got {self.budgets}")
        rising = all(a < b for a, b in pairwise(self.budgets))
        if not rising or any(a < b for a, b in pairwise(self.penalties)):
            raise ValueError(f"budgets must rise and penalties fall, got {self.budgets} and {self.penalties}")

    def penalty(self, budget: float) -> float:
        """TypeError for what is no number, ValueError for a budget outside the table."""
        if isinstance(budget, bool) or not isinstance(budget, Real):
            raise TypeError(f"budget must be a number, the share of the dense model's visits, got {budget!r}")
        low, high = self.budgets[0], self.budgets[-1]
        if not low - 1e-6 <= budget <= high + 1e-6:  # NaN, too
            raise ValueError(
                f"budget {budget}: these routers were calibrated for budgets from {low:.3g} to {high:.3g}; ask for one "
                "of those, or calibrate them for others (drllm-fast calibrate)"
            )
        return float(np.interp(budget, self.budgets, self.penalties))

    def to_dict(self) -> dict[str, Any]:
        return {"budgets": list(self.budgets), "penalties": list(self.penalties), "source": self.source}

    @classmethod
    def from_dict(cls, data: Any) -> BudgetTable:
        """ValueError for what `to_dict` does not write."""
        fits = isinstance(data, dict) and data.keys() == {"budgets", "penalties", "source"}
        kinds = {"budgets": Sequence, "penalties": Sequence, "source": dict}
        if not fits or not all(isinstance(data[key], kind) for key, kind in kinds.items()):
            raise ValueError(f"calibration must be None or a table of budgets and penalties, got {data!r:.80}")
        return cls(tuple(data["budgets"]), tuple(data["penalties"]), dict(data["source"]))
