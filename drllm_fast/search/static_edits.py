"""What one edit of the path gains if it is used for every prompt, measured on prompts that did not choose it.

Each unit's probes are single edits drawn without looking at outcomes. An observation is the paired difference

    d = [the edit's answer is right] - [the dense path's answer is right]

Units fall into two halves by a hash of their item's id. The edit of the largest mean d on one half (`selection_gain`,
too good by the luck of the choice) is measured on the other; then the halves change places, and both are averaged:
SE = sqrt(se_1^2 + se_2^2) / 2.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from drllm_fast.report import ranges
from drllm_fast.search.figures import Mean

LEAST = 10  # observations of an edit, in each half


def edit_name(path: str) -> str:
    """A stored path as its difference from the dense one: 'dense', 'skip 19-20', 'skip 3, repeat 27'."""
    parts = []
    for word, digit in (("skip", "0"), ("repeat", "2")):
        if blocks := [block for block, times in enumerate(path) if times == digit]:
            parts.append(f"{word} {ranges(blocks, width=10 * len(path))}")
    return ", ".join(parts) or "dense"


def half_of(item: str) -> int:
    """0 or 1, the same for an item wherever it occurs."""
    return hashlib.blake2b(item.encode(), digest_size=1).digest()[0] & 1


class StaticEdits:
    """Collects probes, and tells what the best static edit gains."""

    def __init__(self) -> None:
        self.halves: tuple[dict[str, Mean], dict[str, Mean]] = ({}, {})

    def add(self, item: str, dense_right: bool, probes: Sequence[str], right: Sequence[bool]) -> None:
        half = self.halves[half_of(item)]
        for path, hit in zip(probes, right, strict=True):
            half.setdefault(path, Mean()).add(int(hit) - int(dense_right))

    def to_dict(self) -> dict[str, Any]:
        """observations, and least, how many of them an edit needs in each half; best and best_saving (of the edits
        that save layers), None where there are too few; edits: every probed one over both halves, best first."""
        paths = sorted(self.halves[0].keys() | self.halves[1].keys())
        pooled = {path: self.halves[0].get(path, Mean()) + self.halves[1].get(path, Mean()) for path in paths}
        observations = sum(mean.n for mean in pooled.values())
        # An edit seen far less often than the others would win by luck.
        least = max(LEAST, math.ceil(observations / len(paths) / 4)) if paths else LEAST
        enough = [path for path in paths if all(path in half and half[path].n >= least for half in self.halves)]
        order = sorted(paths, key=lambda path: (-pooled[path].mean, path))
        return {
            "observations": observations,
            "least": least,
            "best": self._best(enough),
            "best_saving": self._best([path for path in enough if _visits(path) < len(path)]),
            "edits": [{"edit": edit_name(path), "path": path} | pooled[path].to_dict() for path in order],
        }

    def _best(self, paths: list[str]) -> dict[str, Any] | None:
        """gain and se on the half that did not choose, n of both; selection_gain; ways: each choice."""
        if not paths:
            return None
        ways = []
        for chosen_on, measured_on in (self.halves, self.halves[::-1]):
            path = max(paths, key=lambda path: (chosen_on[path].mean, -_visits(path), path))
            names = {"edit": edit_name(path), "path": path, "saved": len(path) - _visits(path)}
            ways.append(names | {"selected": chosen_on[path].to_dict(), "held_out": measured_on[path].to_dict()})
        held_out = [way["held_out"] for way in ways]
        return {
            "gain": sum(figure["mean"] for figure in held_out) / 2,
            "se": math.hypot(*(figure["se"] for figure in held_out)) / 2,
            "n": sum(figure["n"] for figure in held_out),
            "selection_gain": sum(way["selected"]["mean"] for way in ways) / 2,
            "ways": ways,
        }


def _visits(path: str) -> int:
    return len(path) - path.count("0") + path.count("2")
