"""Random search, the baseline: each path is the dense one after m random edits, m uniform in 1..options["edits"]."""

from __future__ import annotations

from drllm_fast.search.base import BaseSearch, at_least
from drllm_fast.search.paths import LayerPath


class RandomSearch(BaseSearch):
    """See the module. It ends early after MAX_FRUITLESS draws in a row that are all known."""

    OPTIONS = {"edits": 8}
    MAX_FRUITLESS = 1000

    def _start(self) -> None:
        at_least(self.config, self.options, edits=1)

    def _propose(self) -> LayerPath | None:
        for _ in range(self.MAX_FRUITLESS):
            path = self.dense
            for _ in range(self.rng.randint(1, self.options["edits"])):
                path = self._random_edit(path) or path
            if not self._known(path):
                return path
        return None
