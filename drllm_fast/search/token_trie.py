"""The token sequences of one prompt (its context with each answer choice) as a tree: what they share is run once.

Tokens are numbered so that a token's first continuation comes right after it. A segment is a run of numbers that ends
at a leaf; every token but those of the first segment hangs on one of an earlier segment. For two choices

    context a b        0 1 2 3 4        segment 0: 0..4, its keys are 0..4
            c              5            segment 1: 5,    its keys are 0..2 and 5
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class TokenTrie:
    """The tree of one or more non-empty sequences of token ids; S tokens, R segments.

    sequences  what it was made of
    ids        [S]
    positions  [S], of each token in its sequence
    nodes      for each sequence the numbers of its tokens
    lengths    [R], tokens of each segment
    keys       int64, the numbers of the keys of segment 0, of segment 1, ...; the own tokens are the last of each
    held       [R], how many keys each segment has
    """

    def __init__(self, sequences: Sequence[Sequence[int]]):
        if not sequences or not all(sequences):
            raise ValueError("every sequence needs a token")
        self.sequences = tuple(map(tuple, sequences))
        children: list[dict[int, int]] = [{}]  # of temporary nodes, in the order of their making; 0 is above all
        tokens, made = [-1], []
        for sequence in self.sequences:
            at, path = 0, []
            for token in sequence:
                if token not in children[at]:
                    children[at][token] = len(tokens)
                    tokens.append(token)
                    children.append({})
                at = children[at][token]
                path.append(at)
            made.append(path)

        number: dict[int, int] = {}
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.lengths: list[int] = []
        keys: list[list[int]] = []
        waiting = [(first, []) for first in reversed(children[0].values())]  # where a segment starts, and what is above
        while waiting:
            node, above = waiting.pop()
            chain, start = list(above), len(self.ids)
            later: list[tuple[int, list[int]]] = []
            while True:
                number[node] = len(self.ids)
                self.ids.append(tokens[node])
                self.positions.append(len(chain))
                chain.append(number[node])
                following = list(children[node].values())
                if not following:
                    break
                later += [(other, chain.copy()) for other in reversed(following[1:])]
                node = following[0]
            waiting += later
            self.lengths.append(len(self.ids) - start)
            keys.append(chain)
        self.nodes = [[number[node] for node in path] for path in made]
        self.held = [len(chain) for chain in keys]
        self.keys: Tensor = torch.tensor([token for chain in keys for token in chain], device="cpu")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def starts(self) -> list[int]:
        """[R], where each segment's keys begin in `keys`."""
        return [0, *accumulate(self.held[:-1])]
