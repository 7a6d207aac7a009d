"""The settings of a refinement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

REWARDS = ("kl", "margin", "loglik")


@dataclass(frozen=True)
class RefineConfig:
    """What decides a refinement, beside its prompts and the routers' first weights.

    reward         what a path is worth, as in `drllm_fast.search.rewards`: "kl" needs no right answer, "margin" two
                   choices, "loglik" the right answer
    budgets        shares of the dense model's visits, all of which the same routers are to serve; kept rising
    steps          of the optimiser
    batch_size     prompts a step, each at one of the budgets, at least as many as there are budgets
    samples        paths drawn for each of them, at least 2
    temperature    of the routers while paths are drawn; a low one stays near their decisions and explores less
    learning_rate  of AdamW
    clip           the largest norm of a gradient
    anchor         weight of KL(routers || routers as they were) of the draws, in units of the advantages
    dual_rate      how fast the penalty of a budget follows the share of the drawn paths, in logits for each step and
                   each unit of share
    every          steps between two measurements on the prompts held out, and between two checkpoints
    validation     share of the prompts that is held out
    seed           of the split, of the order of prompts and of the draws, from 0

    Raises TypeError or ValueError for what is out of range.
    """

    reward: str = "kl"
    budgets: tuple[float, ...] = (0.8, 0.9, 0.95)
    steps: int = 400
    batch_size: int = 16
    samples: int = 8
    temperature: float = 1.0
    learning_rate: float = 1e-4
    clip: float = 1.0
    anchor: float = 0.01
    dual_rate: float = 1.0
    every: int = 50
    validation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reward not in REWARDS:
            raise ValueError(f"reward must be one of {', '.join(REWARDS)}, got {self.reward!r}")
        if isinstance(self.budgets, Real | str) or not all(isinstance(budget, Real) for budget in self.budgets):
            raise TypeError(f"budgets must be numbers such as (0.8, 0.9, 0.95), got {self.budgets!r}")
        object.__setattr__(self, "budgets", tuple(sorted(map(float, self.budgets))))
        alike = len(set(self.budgets)) < len(self.budgets)
        if not self.budgets or alike or not all(0 < budget < 2 for budget in self.budgets):
            raise ValueError(
                f"budgets must be different shares above 0 (all skipped) and below 2 (all repeated), got {self.budgets}"
            )
        for name, least in {"steps": 1, "batch_size": 1, "samples": 2, "every": 1, "seed": 0}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer from {least} on, got {value!r}")
        if self.batch_size < len(self.budgets):
            raise ValueError(
                f"batch_size must be at least {len(self.budgets)}, a prompt for each budget, got {self.batch_size}"
            )
        for name, fine, allowed in (
            ("temperature", 0 < self.temperature < math.inf, "a number above 0"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0"),
            ("clip", 0 < self.clip < math.inf, "a number above 0"),
            ("anchor", 0 <= self.anchor < math.inf, "a number from 0 on"),
            ("dual_rate", 0 <= self.dual_rate < math.inf, "a number from 0 on"),
            ("validation", 0 < self.validation < 1, "above 0 and below 1: what is kept is decided on it"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")
