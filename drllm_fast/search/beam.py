"""Beam search over edits: of all paths told, the best ones are edited, level by level.

    options["width"]  paths that are edited at a level
    options["depth"]  levels; the simulations left are shared equally among the levels left

At each level the beam's paths take turns in giving a random edit that is not known, until the level's share is asked.
Once all of it is told, the beam becomes the best `width` paths among the old beam and the level; of equal rewards the
shorter path is better, then the one asked first. A good path stays, therefore, where its edits are worse.
"""

from __future__ import annotations

import math

from drllm_fast.search.base import BaseSearch, at_least
from drllm_fast.search.paths import LayerPath, visits


class BeamSearch(BaseSearch):
    """See the module."""

    OPTIONS = {"width": 4, "depth": 10}

    def _start(self) -> None:
        at_least(self.config, self.options, width=1, depth=1)
        self._untried: dict[LayerPath, list[LayerPath]] = {}
        self._turn = 0
        self._levels = self.options["depth"]
        self._beam = [self.dense]
        self._level: list[LayerPath] = []
        self._share = self._new_share()

    def _new_share(self) -> int:
        return math.ceil((self.config.simulations - self.asked) / max(self._levels, 1))

    def _propose(self) -> LayerPath | None:
        if len(self._level) >= self._share or not (path := self._edit()):
            if self.pending or not self._level or self._levels <= 1:
                return None
            self._advance()
            path = self._edit()
        if path is not None:
            self._level.append(path)
        return path

    def _advance(self) -> None:
        ranked = sorted(self._beam + self._level, key=lambda path: (-self.told[path].reward, visits(path)))
        self._beam = ranked[: self.options["width"]]
        self._level = []
        self._levels -= 1
        self._turn = 0
        self._share = self._new_share()

    def _edit(self) -> LayerPath | None:
        """An unknown edit of the beam's next path that has one."""
        for _ in self._beam:
            path = self._beam[self._turn % len(self._beam)]
            self._turn += 1
            if path not in self._untried:
                self._untried[path] = self._shuffled(path)[::-1]
            untried = self._untried[path]
            while untried:
                if not self._known(edit := untried.pop()):
                    return edit
        return None
