"""The search as it was released with Dr.LLM: only leaves are expanded, so that it is one chain of random edits.

The tree has one child a node, hence UCB and the random child never choose anything, and rewards change nothing but when
it stops. The chain ends where no block is left to edit, after L paths at most; options["restart"] begins another one
there, so that a comparison can be made at equal numbers of paths.
"""

from __future__ import annotations

from drllm_fast.search.base import BaseSearch
from drllm_fast.search.paths import LayerPath


class ChainSearch(BaseSearch):
    """See the module."""

    OPTIONS = {"restart": False}
    MAX_FRUITLESS = 100  # chains in a row without a new path

    def _start(self) -> None:
        self._end = self.dense

    def _propose(self) -> LayerPath | None:
        fruitless = 0
        while fruitless < self.MAX_FRUITLESS:
            step = self._random_edit(self._end)
            if step is not None:
                self._end = step
                if not self._known(self._end):
                    return self._end
            elif self.options["restart"]:
                self._end = self.dense
                fruitless += 1
            else:
                break
        return None
