"""Paths spread over budgets, for prices: each skips m random blocks, m uniform in 1..options["skips"] (all but one
block at most), and repeats up to options["repeats"] others.

Blocks are drawn one after the other by the prior's weights, raised to options["sharpness"]: paths through blocks that
nobody would leave out say little about those one would. In a share of options["runs"] of the paths, a block that is
left out takes the next ones with it, each as likely as its weight, at most 1: the best paths often leave out a stretch.
"""

from __future__ import annotations

from drllm_fast.router_reference import EXECUTE, REPEAT, SKIP
from drllm_fast.search.base import BaseSearch, at_least
from drllm_fast.search.paths import LayerPath


class SpreadSearch(BaseSearch):
    """See the module. It ends early after MAX_FRUITLESS draws in a row that are all known."""

    OPTIONS = {"skips": 9, "repeats": 1, "sharpness": 1.0, "runs": 0.5}
    MAX_FRUITLESS = 1000

    def _start(self) -> None:
        at_least(self.config, self.options, skips=1, repeats=0, sharpness=0.0, runs=0.0)

    def _propose(self) -> LayerPath | None:
        for _ in range(self.MAX_FRUITLESS):
            path = list(self.dense)
            runs = self.rng.random() < self.options["runs"]
            self._change(path, SKIP, self.rng.randint(1, max(1, min(self.options["skips"], self.num_layers - 1))), runs)
            self._change(path, REPEAT, self.rng.randint(0, self.options["repeats"]), False)
            if not self._known(tuple(path)) and sum(path) <= self._longest:
                return tuple(path)
        return None

    def _change(self, path: list[int], to: int, count: int, runs: bool) -> None:
        left = count
        while left and (free := [block for block, times in enumerate(path) if times == EXECUTE]):
            weights = [self._block_weight(block, to) for block in free]
            if not any(weights) and path != list(self.dense):
                return  # blocks of weight 0 are left alone, but a path must differ from the dense one
            block = self.rng.choices(free, weights if any(weights) else None)[0]
            path[block], left = to, left - 1
            while runs and left and block + 1 < len(path) and path[block + 1] == EXECUTE:
                block += 1
                if self.rng.random() >= self._block_weight(block, to):
                    break
                path[block], left = to, left - 1

    def _block_weight(self, block: int, to: int) -> float:
        if self.prior is None:
            return 1.0
        return self.prior[block][(SKIP, REPEAT).index(to)] ** self.options["sharpness"]
