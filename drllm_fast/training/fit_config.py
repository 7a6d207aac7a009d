"""The settings of a fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

CHOICES = {"schedule": ("cosine", "constant"), "balance": ("effective", "none"), "robust": ("none", "cvar")}


@dataclass(frozen=True)
class FitConfig:
    """What decides a fit, beside its data and the routers' first weights. The defaults are as published, but for beta.

    epochs, batch_size  prompts a step
    learning_rate, weight_decay   of AdamW
    warmup_steps        the rate rises linearly; at most a quarter of all steps, so that short fits learn, too
    schedule            after that: "cosine", down to 0, or "constant"
    gamma               of the focal loss; 0: cross-entropy
    balance, beta       "effective": class weights, see `loss.effective_number_weights`; "none": all 1. beta None is
                        1 - 1 / labels; 0.999, as published, hardly weighs
    logit_adjustment    tau of `loss.adjust`, over all layers together; 0: none
    robust, cvar        "cvar" draws prompts of the worst groups more often, see `drllm_fast.training.groups`; the share
                        of groups that are the worst, for the reported figure as well
    validation          share of the prompts that is held out
    seed                of the split and of the order of prompts, from 0

    Raises ValueError for what is out of range.
    """

    epochs: int = 25
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 500
    schedule: str = "cosine"
    gamma: float = 2.0
    beta: float | None = None
    balance: str = "effective"
    logit_adjustment: float = 0.0
    robust: str = "none"
    cvar: float = 0.3
    validation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"epochs": 1, "batch_size": 1, "warmup_steps": 0, "seed": 0}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer from {least} on, got {value!r}")
        for name, fine, allowed in (
            ("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number from 0 on"),
            ("gamma", 0 <= self.gamma < math.inf, "a number from 0 on"),
            ("beta", self.beta is None or 0 <= self.beta < 1, "None, or from 0 to below 1"),
            ("logit_adjustment", 0 <= self.logit_adjustment < math.inf, "a number from 0 on"),
            ("cvar", 0 < self.cvar <= 1, "above 0 and at most 1"),
            ("validation", 0 <= self.validation < 1, "from 0 to below 1"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0, of `steps`."""
        warmup = self.warmup(steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    def warmup(self, steps: int) -> int:
        return min(self.warmup_steps, steps // 4)
