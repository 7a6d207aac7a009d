"""Groups of prompts (tasks, levels), and training that looks after the worst of them.

    CVaR = max over q of  sum over g of  q_g l_g,   0 <= q_g <= 1 / (share G),  sum of q = 1

the mean loss of the worst `share` of G groups, each group counting alike: Rockafellar & Uryasev 2000; in this dual
form Levy et al. 2020 (arXiv 2010.05893). The maximum is at q = 1 / (share G) on the groups of the largest losses, the
last of them with what remains of 1.

An epoch draws example i of group g with probability  (1 - s) / N + s q_g / n_g,  s = `OVERSAMPLED`: it descends on
(1 - s) mean + s CVaR. The first half keeps groups in training that are not among the worst at present.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OVERSAMPLED = 0.5  # share of an epoch's draws that is for the worst groups


@dataclass(frozen=True)
class Part:
    """Prompts of a training set, and their groups.

    rows   int64 [n], numbers of the prompts
    names  of the G groups that these prompts are of
    group  int64 [n], of each prompt
    sizes  int64 [G]
    """

    rows: np.ndarray
    names: list[str]
    group: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, groups: Sequence[str] | None) -> Part:
        """The prompts `rows`; groups has a name for every prompt there is, None makes one group of them."""
        named = ["all" if groups is None else groups[row] for row in rows]
        names, group, sizes = np.unique(np.array(named, dtype=str), return_inverse=True, return_counts=True)
        return cls(rows, names.tolist(), group, sizes)

    def uniform(self) -> np.ndarray:
        return np.full(len(self.rows), 1 / len(self.rows))

    def means(self, places: np.ndarray, losses: np.ndarray, before: np.ndarray | None = None) -> np.ndarray:
        """Mean loss [G] of each group, from losses of the prompts rows[places]; of one that has none, `before`."""
        group = self.group[places]
        drawn = np.bincount(group, minlength=len(self.names))
        totals = np.bincount(group, weights=losses, minlength=len(self.names))
        means = totals / np.maximum(drawn, 1)
        return means if before is None else np.where(drawn, means, before)


def worst(losses: np.ndarray, share: float) -> np.ndarray:
    """q, fp64 [G]: how much each group counts in the CVaR of `losses` [G]. share in (0, 1]; ties by position."""
    most = 1 / max(share * len(losses), 1.0)
    weights = np.zeros(len(losses))
    order = np.argsort(-losses, kind="stable")
    before = np.arange(len(losses)) * most
    weights[order] = np.clip(1 - before, 0, most)
    return weights


def cvar(losses: np.ndarray, share: float) -> float:
    """The mean of the largest `share` of `losses` [G]."""
    return float(worst(losses, share) @ losses)


def oversampled(part: Part, losses: np.ndarray, share: float) -> np.ndarray:
    """How likely each prompt of `part` is to be drawn, fp64 [n], given its groups' losses [G]."""
    return (1 - OVERSAMPLED) * part.uniform() + OVERSAMPLED * (worst(losses, share) / part.sizes)[part.group]


def draw(rng: np.random.Generator, probabilities: np.ndarray) -> np.ndarray:
    """N draws of 0..N-1 in random order, i expected N p_i times and drawn that often rounded down or up.

    Systematic resampling: equal probabilities give a permutation.
    """
    count = len(probabilities)
    order = rng.permutation(count)
    if np.ptp(probabilities) == 0:
        return order
    ends = np.cumsum(probabilities[order])
    points = (np.arange(count) + rng.random()) / count * ends[-1]
    drawn = order[np.searchsorted(ends, points, side="right").clip(max=count - 1)]
    return rng.permutation(drawn)
