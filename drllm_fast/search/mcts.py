"""Monte Carlo tree search over edits of the dense path, after Dr.LLM (arXiv 2510.12773), with inner nodes that branch.

A node is a path, its children are edits of it. A simulation walks down from the dense path, by

    UCB(child) = Q / v + c sqrt(ln V / v) - lambda |path| / L

with v visits of the child, Q the sum of their rewards, V visits of the parent and |path| the child's visits of blocks;
c is `config.exploration` and lambda `config.length_penalty`. With probability `config.random_child` any child is taken
instead. The walk ends at a path that is not known yet, whose reward is added to all nodes walked over.

Scale. As long as all told rewards are 0 or 1, they count as they are. Otherwise Q / v is mapped to 0 for the worst and
1 for the best of the children to choose from, so that c and lambda mean the same whatever the reward's unit, and a
ruined path elsewhere in the tree does not press these together.

Widening. A node has at most ceil(k V^alpha) children: as it is visited more, new edits are tried beside the known ones
(progressive widening, Coulom 2007, doi:10.1142/S1793005707001094). By default 200 visits give 10 children, and these 4
each.

Which edit is tried next. Edits repeat all over the tree. Each told edge gives the gain in reward from parent to child,
shared equally by the blocks it changes; a new edit's estimate is the sum over its blocks of total gain / (count + 1), 0
for what was never tried. The largest estimate goes first, equal ones are in random order, weighted by the prior. 0
or 1 does not tell how much an edit helps: while rewards are that, the estimate has the UCB's length term as well, times
the prior's weight over its mean where a block is skipped, and every other edit, about, is drawn at random as the paper
does, for by length alone a repeat would never be tried.

Transpositions. Edits commute, so that nodes are shared by path: a DAG. A walk adds to the nodes it came through only.

Parallel simulations. A path that was asked and not told counts in all nodes walked over as a visit of the lowest reward
(virtual loss, Chaslot et al. 2008, doi:10.1007/978-3-540-87608-3_6), and nothing is tried below it. The fewer paths are
asked at once, the more each is chosen by what is known: where many searches share a batch, let each ask for few.

    options["widening"], ["widening_power"]  k, alpha; with k = 0 only leaves expand
    options["learn_order"]                   whether gains order the edits; else only the prior does
    options["random_edit"]                   with rewards of 0 and 1: the share of edits that are drawn
"""

from __future__ import annotations

import math

from drllm_fast.router_reference import EXECUTE, SKIP
from drllm_fast.search.base import BaseSearch, Outcome, at_least
from drllm_fast.search.paths import LayerPath, visits


class Node:
    """A path in the tree. `waiting` counts its asked and untold visits, `untried` holds edits, the next one last."""

    def __init__(self, path: LayerPath, untried: list[LayerPath]) -> None:
        self.path = path
        self.length = visits(path)
        self.untried = untried
        self.children: list[Node] = []
        self.visits = 0
        self.waiting = 0
        self.total = 0.0


class TreeSearch(BaseSearch):
    """See the module. `root` is the dense path's node, `nodes` the table of all by path."""

    OPTIONS = {"widening": 0.7, "widening_power": 0.5, "learn_order": True, "random_edit": 0.5}

    def _start(self) -> None:
        at_least(self.config, self.options, widening=0, widening_power=0, random_edit=0)
        if self.options["random_edit"] > 1:
            raise ValueError(f"options['random_edit'] must be between 0 and 1, got {self.options['random_edit']}")
        self.nodes: dict[LayerPath, Node] = {}
        self.root = self._node(self.dense)
        self._walks: dict[LayerPath, list[Node]] = {}
        self._gains: dict[tuple[int, int], tuple[float, int]] = {}  # total and count, by block and how often it runs
        skips = [skip for skip, _ in self.prior or [(1.0, 1.0)] * self.num_layers]
        self._skip_weights = [skip * self.num_layers / (sum(skips) or 1.0) for skip in skips]
        self._binary = True
        self._count([self.root], self.told[self.dense].reward)

    def _propose(self) -> LayerPath | None:
        walk = self._walk(self.root, set())
        if walk is None:
            return None
        for node in walk:
            node.waiting += 1
        self._walks[walk[-1].path] = walk
        return walk[-1].path

    def _learn(self, path: LayerPath, outcome: Outcome) -> None:
        walk = self._walks.pop(path)
        for node in walk:
            node.waiting -= 1
        self._count(walk, outcome.reward)
        parent = walk[-2].path
        changes = _changes(parent, path)
        gain = (outcome.reward - self.told[parent].reward) / len(changes)
        for change in changes:
            total, count = self._gains.get(change, (0.0, 0))
            self._gains[change] = total + gain, count + 1

    def _count(self, walk: list[Node], reward: float) -> None:
        for node in walk:
            node.visits += 1
            node.total += reward
        self._binary &= reward in (0, 1)

    def _walk(self, node: Node, barren: set[LayerPath]) -> list[Node] | None:
        """Nodes from `node` down to a path not known yet. None, and `node` in `barren`, where there is none."""
        while (child := self._next(node, barren)) is not None:
            if not self._known(child.path):
                return [node, child]
            if child.path not in barren and child.path not in self.pending:
                below = self._walk(child, barren)
                if below is not None:
                    return [node, *below]
        barren.add(node.path)
        return None

    def _next(self, node: Node, barren: set[LayerPath]) -> Node | None:
        """The child to walk to: a further one where the node may widen or has no other way down."""
        ways = [child for child in node.children if child.path not in barren and child.path not in self.pending]
        if node.untried and (not ways or len(node.children) < self._width(node)):
            child = self._node(self._next_edit(node))
            node.children.append(child)
            return child
        if not ways:
            return None
        if self.rng.random() < self.config.random_child:
            return self.rng.choice(ways)
        scores = self._ucb(node, ways)
        return ways[scores.index(max(scores))]

    def _width(self, node: Node) -> int:
        count = node.visits + node.waiting
        return math.ceil(self.options["widening"] * count ** self.options["widening_power"])

    def _ucb(self, parent: Node, children: list[Node]) -> list[float]:
        means = [child.total / child.visits for child in children]
        if not self._binary:
            low, high = min(means), max(means)
            means = [(mean - low) / (high - low) if high > low else 0.5 for mean in means]
        log = math.log(parent.visits + parent.waiting)
        scores = []
        for child, mean in zip(children, means, strict=True):
            count = child.visits + child.waiting
            explore = self.config.exploration * math.sqrt(log / count)
            scores.append(mean * child.visits / count + explore - self._penalty(child.length))
        return scores

    def _penalty(self, length: int) -> float:
        return self.config.length_penalty * length / self.num_layers

    def _next_edit(self, node: Node) -> LayerPath:
        """Takes the edit with the largest estimate from the untried ones."""
        if not self.options["learn_order"]:
            return node.untried.pop()
        if self._binary and self.rng.random() < self.options["random_edit"]:
            return node.untried.pop()

        def estimate(index: int) -> tuple[float, int]:
            total = 0.0
            for change in _changes(node.path, node.untried[index]):
                gain, count = self._gains.get(change, (0.0, 0))
                total += gain / (count + 1)
                if self._binary:
                    block, times = change
                    total -= self._penalty(times - EXECUTE) * (self._skip_weights[block] if times == SKIP else 1)
            return total, index

        return node.untried.pop(max(range(len(node.untried)), key=estimate))

    def _node(self, path: LayerPath) -> Node:
        if path not in self.nodes:
            self.nodes[path] = Node(path, self._shuffled(path)[::-1])
        return self.nodes[path]


def _changes(path: LayerPath, edit: LayerPath) -> list[tuple[int, int]]:
    """The blocks an edit changes, each with how often it runs then."""
    return [(block, times) for block, times in enumerate(edit) if path[block] != times]
