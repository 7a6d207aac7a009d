"""How sure a mean is, and a difference of two means over the same items.

    bootstrap interval   percentiles of the means of samples drawn with replacement (Efron 1979), 95 %
    paired difference    the same of the differences, item by item; p is twice the share of samples on the other side
                         of 0, the observed one counted in: 2 (1 + min(#<=0, #>=0)) / (1 + samples), at most 1
    McNemar, exact       of the pairs that differ, k of n in favour: twice the smaller tail of Binomial(n, 1/2)
                         (McNemar 1947)

With weights a mean is sum w x / sum w, whose numerator and denominator are both drawn: the mean per token of documents
of n tokens each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
SAMPLES = 5000
CHUNK = 1 << 22  # of drawn indices held at once


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """p: two-sided, of a difference of 0."""

    p: float


def resampled_means(
    values: Any, *, weights: Any = None, samples: int = SAMPLES, seed: int | list[int] = 0
) -> np.ndarray:
    """float64 [samples] or [samples, k]: means of values [n] or [n, k] over samples of n rows drawn with replacement.

    The same rows are drawn for all columns, and for the same n, samples and seed: their differences are paired.
    ValueError for no values, and for weights that are not positive.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if not n:
        raise ValueError("no values to draw from")
    weights = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != (n,) or not (weights > 0).all():
        raise ValueError(f"weights must be {n} positive numbers, got {weights!r:.80}")
    weighted = values * (weights if values.ndim == 1 else weights[:, None])
    rng = np.random.default_rng(seed)
    means = np.empty((samples, *values.shape[1:]))
    step = max(1, CHUNK // n)
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        total = times @ weights
        means[start : start + rows] = times @ weighted / (total if values.ndim == 1 else total[:, None])
    return means


def interval(mean: float, means: np.ndarray) -> Interval:
    """From a mean and resampled ones [samples]."""
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(mean), float(low), float(high))


def difference(mean: float, means: np.ndarray) -> Difference:
    """From a mean of differences and resampled ones [samples]."""
    ends = interval(mean, means)
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Difference(ends.mean, ends.low, ends.high, min(1.0, 2 * (1 + beyond) / (1 + len(means))))


def mean_interval(values: Any, *, weights: Any = None, samples: int = SAMPLES, seed: int = 0) -> Interval:
    """Of the mean of values [n]."""
    return interval(
        np.average(values, weights=weights), resampled_means(values, weights=weights, samples=samples, seed=seed)
    )


def paired_difference(a: Any, b: Any, *, weights: Any = None, samples: int = SAMPLES, seed: int = 0) -> Difference:
    """Of the mean of a - b, for a and b [n] of the same items. ValueError for different lengths."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a pair needs two values: given {a.shape} and {b.shape}")
    change = a - b
    return difference(
        np.average(change, weights=weights), resampled_means(change, weights=weights, samples=samples, seed=seed)
    )


def mcnemar(a: Any, b: Any) -> float:
    """Two-sided p of a and b [n], right or wrong on the same items, being right as often. ValueError for different
    lengths."""
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"a pair needs two values: given {a.shape} and {b.shape}")
    won, lost = int((a & ~b).sum()), int((~a & b).sum())
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))
