"""Synthetic rewards of layer paths with a known optimum, for tests of searches; L = 30 unless said otherwise.

A landscape is `evaluate(path) -> Outcome`, with `value(path)`, what a path is truly worth, and the best value there is.
`score` maps values to 0 for the dense path and 1 for the best one.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from drllm_fast.search.paths import LayerPath, dense_path, encode
from drllm_fast.search.searcher import Outcome, make_searcher
from drllm_fast.search.unit import SearchConfig

LAYERS = 30


@dataclass
class Landscape:
    value: Callable[[LayerPath], float]
    best: LayerPath
    reward: Callable[[LayerPath], float] | None = None  # value by default
    correct: Callable[[LayerPath], bool] = lambda path: False

    def evaluate(self, path: LayerPath) -> Outcome:
        return Outcome((self.reward or self.value)(path), self.correct(path))

    def score(self, path: LayerPath) -> float:
        dense = self.value(dense_path(len(path)))
        return (self.value(path) - dense) / (self.value(self.best) - dense)


def additive(seed: int) -> Landscape:
    """Eight skips and two repeats help, all other edits of a block hurt; blocks are independent."""
    gains, best = _gains(seed)
    return Landscape(lambda path: _sum(gains, path), best)


def interacting(seed: int) -> Landscape:
    """Additive, but neighbouring good skips in `pairs` pay twice only together, and one alone pays nothing."""
    gains, best = _gains(seed)
    good = [block for block, times in enumerate(best) if times == 0]
    pairs = list(zip(good[::2], good[1::2], strict=False))[:3]

    def value(path: LayerPath) -> float:
        total = _sum(gains, path)
        for a, b in pairs:
            if (path[a] == 0) != (path[b] == 0):
                total -= gains[a][0] if path[a] == 0 else gains[b][0]
            elif path[a] == 0:
                total += 0.5 * (gains[a][0] + gains[b][0])
        return total

    return Landscape(value, best)


def needle(seed: int) -> Landscape:
    """Minus the number of blocks that differ from a path with eight skips and two repeats; only that one is correct."""
    _, best = _gains(seed)
    return Landscape(lambda path: -sum(a != b for a, b in zip(path, best, strict=True)), best, correct=best.__eq__)


def noisy(seed: int) -> Landscape:
    """Additive, told with noise of deviation 1, the same whenever a path is asked."""
    gains, best = _gains(seed)

    def reward(path: LayerPath) -> float:
        noise = random.Random(zlib.crc32(encode(path).encode()) + seed).gauss(0, 1)
        return _sum(gains, path) + noise

    return Landscape(lambda path: _sum(gains, path), best, reward=reward)


def ruinous(seed: int) -> Landscape:
    """Additive, like a log-likelihood: skipping any of five blocks that do not help costs 30 more."""
    gains, best = _gains(seed)
    ruin = random.Random(seed).sample([block for block, times in enumerate(best) if times == 1], 5)
    return Landscape(lambda path: _sum(gains, path) - 30 * sum(path[block] == 0 for block in ruin), best)


def exact(seed: int) -> Landscape:
    """Reward 0 or 1: correct while the damage of all edits is at most 1. Worth the visits saved by correct paths."""
    rng = random.Random(seed)
    damage = [(rng.choice((0.05, 0.2, 0.6, 1.2)), rng.choice((0.05, 0.6))) for _ in range(LAYERS)]

    def correct(path: LayerPath) -> bool:
        total = sum(damage[block][times // 2] for block, times in enumerate(path) if times != 1)
        return total <= 1 + 1e-9

    left, best = 1.0, list(dense_path(LAYERS))
    for block in sorted(range(LAYERS), key=lambda block: damage[block][0]):
        if damage[block][0] <= left + 1e-9:
            left -= damage[block][0]
            best[block] = 0

    def value(path: LayerPath) -> float:
        return LAYERS - sum(path) if correct(path) else 0.0

    return Landscape(value, tuple(best), reward=lambda path: float(correct(path)), correct=correct)


LANDSCAPES = {f.__name__: f for f in (additive, interacting, needle, noisy, ruinous, exact)}


def _gains(seed: int) -> tuple[list[tuple[float, float]], LayerPath]:
    """For each block what its skip and its repeat are worth, and the path of all that help."""
    rng = random.Random(seed)
    blocks = rng.sample(range(LAYERS), 10)
    gains = [(-rng.uniform(0.2, 2), -rng.uniform(0.1, 1)) for _ in range(LAYERS)]
    best = list(dense_path(LAYERS))
    for i, block in enumerate(blocks):
        skip, repeat = gains[block]
        gains[block] = (rng.uniform(0.5, 1.5), repeat) if i < 8 else (skip, rng.uniform(0.5, 1.5))
        best[block] = 0 if i < 8 else 2
    return gains, tuple(best)


def _sum(gains: list[tuple[float, float]], path: LayerPath) -> float:
    return sum(gains[block][times // 2] for block, times in enumerate(path) if times != 1)


def run(landscape: Landscape, config: SearchConfig, seed: int, batch: int = 8, num_layers: int = LAYERS, prior=None):
    """A search to its end: the searcher, and the asked paths by order."""
    search = make_searcher(config, num_layers, landscape.evaluate(dense_path(num_layers)), seed, prior)
    asked: list[LayerPath] = []
    while not search.done:
        paths = search.ask(batch)
        assert paths or search.done
        asked += paths
        for path in paths:
            search.tell(path, landscape.evaluate(path))
    return search, asked


def reached(landscape: Landscape, search) -> float:
    """Score of the path with the largest reward told; of equal rewards the shortest."""
    best = min(search.told, key=lambda path: (-search.told[path].reward, sum(path), encode(path)))
    return landscape.score(best)
