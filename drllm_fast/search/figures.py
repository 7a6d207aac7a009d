"""Figures with their uncertainty, collected one observation at a time.

    Share   k of n          Wilson's 95 % interval (1927): (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    Mean    sum x / n       SE = s / sqrt(n), s^2 with n - 1
    Ratio   sum x / sum m   SE = sqrt(n / (n-1) sum (x - r m)^2) / sum m: clusters of observations, as a unit's paths

A figure of nothing is None, not 0, and so is a standard error of fewer than two observations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Z = 1.959963984540054  # 97.5 % of a standard normal distribution


@dataclass
class Share:
    count: int = 0
    n: int = 0

    def add(self, hit: bool) -> None:
        self.count += hit
        self.n += 1

    def to_dict(self) -> dict[str, Any]:
        """count, n, share; low, high: the interval."""
        low, high = wilson(self.count, self.n)
        share = self.count / self.n if self.n else None
        return {"count": self.count, "n": self.n, "share": share, "low": low, "high": high}


def wilson(count: int, n: int) -> tuple[float | None, float | None]:
    """Wilson's 95 % interval of a proportion."""
    if not n:
        return None, None
    share = count / n
    centre = share + Z * Z / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    # At 0 and 1 the bound is exact, and rounding must not put it outside.
    return (centre - half) / scale if count else 0.0, (centre + half) / scale if count < n else 1.0


@dataclass
class Mean:
    n: int = 0
    total: float = 0
    squares: float = 0

    def add(self, value: float) -> None:
        self.n += 1
        self.total += value
        self.squares += value * value

    @property
    def mean(self) -> float | None:
        return self.total / self.n if self.n else None

    @property
    def se(self) -> float | None:
        if self.n < 2:
            return None
        return math.sqrt(max(self.squares - self.total * self.total / self.n, 0.0) / (self.n - 1) / self.n)

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.n + other.n, self.total + other.total, self.squares + other.squares)

    def to_dict(self) -> dict[str, Any]:
        """n, mean, se."""
        return {"n": self.n, "mean": self.mean, "se": self.se}


@dataclass
class Ratio:
    n: int = 0  # clusters
    hits: int = 0
    of: int = 0
    _xx: int = 0
    _xm: int = 0
    _mm: int = 0

    def add(self, hits: int, of: int) -> None:
        """One cluster: `hits` among `of`. A cluster of nothing is left out."""
        if not of:
            return
        self.n += 1
        self.hits += hits
        self.of += of
        self._xx += hits * hits
        self._xm += hits * of
        self._mm += of * of

    def to_dict(self) -> dict[str, Any]:
        """count, of, n (clusters), share, se."""
        share = self.hits / self.of if self.of else None
        se = None
        if share is not None and self.n > 1:
            residual = max(self._xx - 2 * share * self._xm + share * share * self._mm, 0.0)
            se = math.sqrt(residual * self.n / (self.n - 1)) / self.of
        return {"count": self.hits, "of": self.of, "n": self.n, "share": share, "se": se}
