"""What every search keeps: the paths asked and told, how many may still be asked, and when to stop.

A method gives `_start`, its set-up, `_propose`, the next path to evaluate, and `_learn`, what to make of an outcome.
Early stop follows the paper (arXiv 2510.12773): at the first correct path where the dense path answers wrongly, else at
a correct path at least 2 visits shorter than the dense one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drllm_fast.router_reference import REPEAT, SKIP
from drllm_fast.search.paths import LayerPath, dense_path, edits, encode, visits
from drllm_fast.search.unit import SearchConfig

BlockWeights = tuple[float, float]  # of one block: how readily it is skipped, and repeated
EARLY_STOP_SAVING = 2  # visits


@dataclass(frozen=True)
class Outcome:
    """What an evaluated path got: its reward, a finite number that is larger for better, and whether it is correct."""

    reward: float
    correct: bool


class BaseSearch:
    """Bookkeeping under `drllm_fast.search.searcher.Searcher`, which says what `ask`, `tell` and `done` do.

    OPTIONS  the method's options and their defaults; a default's type is the option's
    told     outcomes by path, the dense path among them
    pending  paths asked and not yet told, in order
    """

    OPTIONS: Mapping[str, Any] = {}

    def __init__(
        self,
        config: SearchConfig,
        num_layers: int,
        dense: Outcome,
        seed: int,
        prior: Sequence[BlockWeights] | None = None,
    ) -> None:
        self.config = config
        self.num_layers = num_layers
        self.options = read_options(config, self.OPTIONS)
        self.prior = prior
        self.rng = random.Random(seed)
        self.dense = dense_path(num_layers)
        self.told: dict[LayerPath, Outcome] = {self.dense: dense}
        self.pending: dict[LayerPath, None] = {}
        self.asked = 0
        self._longest = math.floor(config.max_length * num_layers + 1e-9)  # 1.15 * 20 is below 23
        self._stopped = False
        self._exhausted = False
        self._start()

    @property
    def done(self) -> bool:
        return self._stopped or (self._spent and not self.pending)

    @property
    def _spent(self) -> bool:
        return self._exhausted or self.asked >= self.config.simulations

    def ask(self, n: int) -> list[LayerPath]:
        if n < 0:
            raise ValueError(f"the number of paths to ask for must be 0 or more, got {n}")
        found: list[LayerPath] = []
        while len(found) < n and not self._stopped and not self._spent:
            path = self._propose()
            if path is None:
                self._exhausted = not self.pending
                break
            self.pending[path] = None
            self.asked += 1
            found.append(path)
        return found

    def tell(self, path: LayerPath, outcome: Outcome) -> None:
        if path not in self.pending:
            raise ValueError(f"path {encode(path)} is not one that was asked and is still to be told")
        if not math.isfinite(outcome.reward):
            raise ValueError(f"the reward of path {encode(path)} must be a finite number, got {outcome.reward}")
        del self.pending[path]
        self.told[path] = outcome
        if self.config.early_stop and outcome.correct:
            saved = self.num_layers - visits(path)
            self._stopped |= not self.told[self.dense].correct or saved >= EARLY_STOP_SAVING
        self._learn(path, outcome)

    def _start(self) -> None:
        """The method's own set-up, and ValueError for its options."""

    def _propose(self) -> LayerPath | None:
        """A path neither told nor pending; None where there is none now."""
        raise NotImplementedError

    def _learn(self, path: LayerPath, outcome: Outcome) -> None:
        """Called once for each told path."""

    def _known(self, path: LayerPath) -> bool:
        return path in self.told or path in self.pending

    def _edits(self, path: LayerPath) -> list[LayerPath]:
        """The edits of a path that keep to the maximum length."""
        return [edit for edit in edits(path) if visits(edit) <= self._longest]

    def _weight(self, path: LayerPath, edit: LayerPath) -> float:
        """The prior's weight of an edit of `path`, 1 without a prior; of two skipped blocks, the smaller one's."""
        if self.prior is None:
            return 1.0
        changed = (block for block, times in enumerate(path) if edit[block] != times)
        return min(self.prior[block][(SKIP, REPEAT).index(edit[block])] for block in changed)

    def _random_edit(self, path: LayerPath) -> LayerPath | None:
        """An edit drawn by its weight, any of them where all weigh nothing; None where there is no edit."""
        found = self._edits(path)
        if not found:
            return None
        weights = [self._weight(path, edit) for edit in found] if self.prior is not None else []
        return self.rng.choices(found, weights if any(weights) else None)[0]

    def _shuffled(self, path: LayerPath) -> list[LayerPath]:
        """The edits of a path in random order, each drawn by its weight among those left (Efraimidis & Spirakis 2006,
        doi:10.1016/j.ipl.2005.11.003)."""

        def key(edit: LayerPath) -> float:
            draw, weight = self.rng.random(), self._weight(path, edit)
            return -math.log1p(-draw) / weight if weight > 0 else math.inf

        return sorted(self._edits(path), key=key)


def read_options(config: SearchConfig, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options with defaults filled in. ValueError for an unknown one, or one of another type."""
    unknown = sorted(set(config.options) - set(defaults))
    if unknown:
        allowed = ", ".join(defaults) or "none"
        raise ValueError(f"method {config.method!r} has no option {unknown[0]!r}; its options are: {allowed}")
    for name, value in config.options.items():
        wanted = type(defaults[name])
        fits = type(value) is wanted or (wanted is float and type(value) is int)
        if not fits or (wanted is float and not math.isfinite(value)):
            raise ValueError(
                f"option {name!r} of method {config.method!r} must be of type {wanted.__name__}, got {value!r}"
            )
    return {**defaults, **config.options}


def at_least(config: SearchConfig, options: Mapping[str, Any], **least: float) -> None:
    """ValueError where an option is below its least value."""
    for name, bound in least.items():
        if options[name] < bound:
            raise ValueError(
                f"option {name!r} of method {config.method!r} must be {bound} or more, got {options[name]}"
            )
