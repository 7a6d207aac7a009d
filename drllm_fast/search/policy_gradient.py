"""Policy gradient without a backward pass: REINFORCE over one categorical distribution for each block.

    p_l = softmax(theta_l - mu (0, 1, 2))            over skip, execute, repeat
    theta_l += eta A (onehot(path_l) - p_l)          for each told path, p as it was when the path was drawn
    A = sqrt(12) (F(reward) - 1/2)

(Williams 1992, doi:10.1007/BF00992696.) F is the share of the rewards told so far that are lower, of equal ones half,
so that the baseline is their median, and neither the reward's unit nor a few ruined paths change the steps. mu >= 0 is
the smallest that keeps the mean number of visits, the sum over blocks of p_l . (0, 1, 2), to options["budget"] L: the
projection, in KL divergence, to the distributions that keep to the budget. Paths above `config.max_length` and known
paths are drawn again.

    options["budget"]         above 0 and up to 2: the largest mean visits, as a multiple of L
    options["learning_rate"]  eta
    options["edited"]         between 0 and 1: the share of blocks that a path skips or repeats at first, on average,
                              half of them skips; with a prior, in proportion to its weights
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort

from drllm_fast.router_reference import EXECUTE
from drllm_fast.search.base import BaseSearch, Outcome, at_least
from drllm_fast.search.paths import LayerPath, visits

Probabilities = list[list[float]]  # [L, 3]


class PolicyGradientSearch(BaseSearch):
    """See the module. It ends early after MAX_FRUITLESS draws in a row that are all known or too long."""

    OPTIONS = {"budget": 1.0, "learning_rate": 0.3, "edited": 0.15}
    MAX_FRUITLESS = 1000

    def _start(self) -> None:
        if not 0 < self.options["budget"] <= 2:
            raise ValueError(f"option 'budget' must be above 0 and up to 2, got {self.options['budget']}")
        if not 0 < self.options["edited"] < 1:
            raise ValueError(f"option 'edited' must be between 0 and 1, got {self.options['edited']}")
        at_least(self.config, self.options, learning_rate=0)
        self.logits = self._initial()
        self.probabilities = project(self.logits, self.options["budget"])
        self._drawn: dict[LayerPath, Probabilities] = {}
        self._rewards = [self.told[self.dense].reward]  # told ones, sorted

    def _initial(self) -> Probabilities:
        """Logits of blocks that are edited with the probabilities that the prior and `edited` ask for."""
        prior = self.prior or [(1.0, 1.0)] * self.num_layers
        total = sum(map(sum, prior)) or 1.0
        scale = self.options["edited"] * self.num_layers / total
        logits = []
        for skip, repeat in prior:
            edited = min(scale * (skip + repeat), 0.9)
            share = skip / (skip + repeat) if skip + repeat else 0.5
            chances = (edited * share, 1 - edited, edited * (1 - share))
            logits.append([math.log(max(chance, 1e-6)) for chance in chances])
        return logits

    def _propose(self) -> LayerPath | None:
        for _ in range(self.MAX_FRUITLESS):
            path = tuple(self.rng.choices((0, 1, 2), p)[0] for p in self.probabilities)
            if visits(path) <= self._longest and not self._known(path):
                self._drawn[path] = self.probabilities
                return path
        return None

    def _learn(self, path: LayerPath, outcome: Outcome) -> None:
        drawn = self._drawn.pop(path)
        insort(self._rewards, outcome.reward)
        below = bisect_left(self._rewards, outcome.reward) + bisect_right(self._rewards, outcome.reward)
        step = self.options["learning_rate"] * math.sqrt(12) * (below / (2 * len(self._rewards)) - 0.5)
        for logits, p, taken in zip(self.logits, drawn, path, strict=True):
            for choice in range(3):
                logits[choice] += step * ((choice == taken) - p[choice])
        self.probabilities = project(self.logits, self.options["budget"])


def project(logits: Probabilities, budget: float) -> Probabilities:
    """softmax(logits - mu (0, 1, 2)) for [L, 3] logits, with the smallest mu >= 0 of mean visits at most budget L."""

    def tilted(mu: float) -> Probabilities:
        return [_softmax([logit - mu * times for times, logit in enumerate(row)]) for row in logits]

    def fits(p: Probabilities) -> bool:
        return sum(row[EXECUTE] + 2 * row[2] for row in p) <= budget * len(p)

    if fits(p := tilted(0.0)):
        return p
    low, high = 0.0, 1.0
    while not fits(tilted(high)):
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(tilted(middle)) else (middle, high)
    return tilted(high)


def _softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]
