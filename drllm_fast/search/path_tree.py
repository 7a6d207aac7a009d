"""A set of layer paths as a tree of their prefixes: each distinct prefix is run once.

At the entry of block l there is a row for every distinct prefix path[:l] that some path still needs. The block splits a
row into as many as the paths go on from it: a skip keeps its state, execute and repeat share the first pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from drllm_fast.search.paths import LayerPath


class Prefix:
    """The state of one prompt after the blocks of `path`, a prefix of a layer path.

    prompt  which prompt of the forward; set anew by each forward that takes it from the store
    hidden  [1, S, d], set by the forward and kept by a `PrefixStore`
    slots   keys and values of the visits of its last block: none, one or two pairs [1, heads, S, head_dim]
    """

    __slots__ = ("path", "parent", "prompt", "hidden", "slots")

    def __init__(self, path: LayerPath, parent: Prefix | None, prompt: int):
        self.path, self.parent, self.prompt = path, parent, prompt
        self.hidden: Tensor | None = None
        self.slots: tuple[tuple[Tensor, Tensor], ...] = ()

    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.hidden, *(t for pair in self.slots for t in pair)))


@dataclass
class Step:
    """What one block does: `rows` enter; those at the indices `once` run it, those at `twice` (indices into `once`) run
    it again; `children` [(passes, row of that pass, prefix)] leave. `restored` come in from the store after them."""

    rows: list[Prefix] = field(default_factory=list)
    once: list[int] = field(default_factory=list)
    twice: list[int] = field(default_factory=list)
    children: list[tuple[int, int, Prefix]] = field(default_factory=list)
    restored: list[Prefix] = field(default_factory=list)


class PathTree:
    """The tree of `paths[q]`, distinct layer paths of prompt q, from `starts[q][i]` on: the prefix where path i begins,
    the root Prefix((), None, q) or one that holds its state.

    steps   one a block
    leaves  leaves[q][i], the whole path i of prompt q
    """

    def __init__(self, paths: Sequence[Sequence[LayerPath]], starts: Sequence[Sequence[Prefix]], num_layers: int):
        self.steps = [Step() for _ in range(num_layers)]
        entering: list[dict[Prefix, list[LayerPath]]] = [{} for _ in range(num_layers + 1)]
        for own, begins in zip(paths, starts, strict=True):
            for path, start in zip(own, begins, strict=True):
                entering[len(start.path)].setdefault(start, []).append(path)
        rows = entering[0]
        for layer, step in enumerate(self.steps):
            after: dict[Prefix, list[LayerPath]] = {}
            step.rows = list(rows)
            for row, (prefix, going) in enumerate(rows.items()):
                ways: dict[int, list[LayerPath]] = {}
                for path in going:
                    ways.setdefault(path[layer], []).append(path)
                passes = max(ways)
                if passes >= 1:
                    step.once.append(row)
                if passes == 2:
                    step.twice.append(len(step.once) - 1)
                for times in sorted(ways):
                    child = Prefix((*prefix.path, times), prefix, prefix.prompt)
                    at = (row, len(step.once) - 1, len(step.twice) - 1)[times]
                    step.children.append((times, at, child))
                    after[child] = ways[times]
            step.restored = list(entering[layer + 1])
            rows = after | entering[layer + 1]
        self.leaves: list[dict[LayerPath, Prefix]] = [{} for _ in paths]
        for leaf in rows:
            self.leaves[leaf.prompt][leaf.path] = leaf

    @property
    def last(self) -> list[Prefix]:
        """The rows that leave the last block, in order."""
        return [child for _, _, child in self.steps[-1].children] + self.steps[-1].restored
