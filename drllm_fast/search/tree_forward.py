"""One forward of many layer paths: a packed batch whose rows are distinct path prefixes, splitting where paths part.

ids of all prompts [1, T0], each prompt once
   Hugging Face's own forward runs its own loop of layers; at block l, on the rows that enter it:
         pass 1: rows of which a path executes or repeats -> the layer's own forward
         pass 2: rows of which a path repeats             -> the layer's own forward, on the first pass's result
         the rows that leave: the state as it was (skip), after pass 1 (execute), after pass 2 (repeat)
hidden [1, T, d], a row for each path

Tokens of a row lie as in the prompt's `TokenTrie`, and attend to their own branch of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from drllm_fast.attention import NO_MASK
from drllm_fast.key_rows import KeyRows
from drllm_fast.search.path_tree import PathTree
from drllm_fast.search.token_trie import TokenTrie
from drllm_fast.tables import Tables


class TreeVisit:
    """One pass of a block; the attention function says `attended`, the cache leaves keys and values."""

    __slots__ = ("layer", "prompts", "attended", "keys", "values")

    def __init__(self, layer: int, prompts: tuple[int, ...]):
        self.layer, self.prompts = layer, prompts
        self.attended = False
        self.keys: Tensor | None = None
        self.values: Tensor | None = None


class TreeForward:
    """The state of one forward; `prompts[q]` are the tokens of prompt q and `tree` the paths of all of them.

    owner    the Routing whose layers this forward is for
    cache    a cache that hands keys and values to `store`, where they are to be kept; None else
    visits   block visits run, in rows
    """

    takes_base = True  # the base model's forward is run as it is, on packed tokens (`swap.routed_base`)

    def __init__(
        self, owner: object, prompts: Sequence[TokenTrie], tree: PathTree, cache: object, device: torch.device
    ):
        self.owner, self.prompts, self.tree, self.cache, self.device = owner, prompts, tree, cache, device
        self.visit: TreeVisit | None = None
        self.visits = 0
        self._latest = -1  # the block that ran last
        self._outputs: Any = None
        self._begins = [0, *accumulate(map(len, prompts))]
        self._subsets: dict[tuple[int, ...], Tensor] = {}
        self._parts: dict[tuple, tuple[object, object]] = {}
        self._segments: dict[tuple[int, ...], tuple] = {}
        self._layouts: dict[tuple, tuple] = {}
        self._tables = Tables()

    def inputs(self) -> tuple[Tensor, Tensor]:
        """ids and positions [1, T0] of the base model."""
        ids = [token for trie in self.prompts for token in trie.ids]
        positions = [position for trie in self.prompts for position in trie.positions]
        return (
            torch.tensor([ids], device=self.device),
            torch.tensor([positions], device=self.device),
        )

    def run_base(self, forward: Callable[..., Any], **kwargs) -> Any:
        """The base model's own forward; run once, however often the head asks for a part of it."""
        if self._outputs is None:
            self._outputs = forward(**kwargs)
        return self._outputs

    def run_layer(self, module: nn.Module, forward: Callable[..., Tensor], hidden: Tensor, *args, **kwargs) -> Tensor:
        """hidden [1, T, d] of the rows that enter this block -> [1, T', d] of those that leave it."""
        layer = module._drllm_layer
        if layer != self._latest + 1:
            raise NotImplementedError(
                "this model runs its layers more than once a forward, or not in order, so that a layer path does not "
                "say what runs; search another model"
            )
        self._latest = layer
        step = self.tree.steps[layer]
        lengths = [len(self.prompts[row.prompt]) for row in step.rows]
        if layer == 0:
            hidden = _rows(hidden, [row.prompt for row in step.rows], list(map(len, self.prompts)))
        states, sizes, pairs = [hidden], [lengths], []
        for number, chosen in enumerate((step.once, step.twice)):
            if not chosen:
                break
            prompts = tuple(step.rows[i].prompt for i in (chosen if not number else map(step.once.__getitem__, chosen)))
            entering = _rows(states[-1], chosen, sizes[-1])
            self.visit = TreeVisit(layer, prompts)
            out = forward(
                module,
                entering,
                *(self._part(a, prompts) for a in args),
                **{k: self._part(a, prompts) for k, a in kwargs.items()},
            )
            self._check(out)
            states.append(out)
            sizes.append([sizes[-1][i] for i in chosen])
            pairs.append((self.visit.keys, self.visit.values))
            self.visits += len(chosen)
        return self._leave(step, states, sizes, pairs)

    def _leave(self, step, states: list[Tensor], sizes: list[list[int]], pairs: list[tuple]) -> Tensor:
        begins = [[0, *accumulate(size)] for size in sizes]
        wanted = [(times, row) for times, row, _ in step.children]
        if not step.restored and len(states) > 1 and wanted == [(1, row) for row in range(len(sizes[1]))]:
            hidden = states[1]
        elif not step.restored and not wanted:
            hidden = states[0]  # nothing
        else:
            parts = [states[t].narrow(1, begins[t][row], sizes[t][row]) for t, row in wanted]
            hidden = torch.cat([*parts, *(prefix.hidden for prefix in step.restored)], dim=1)
        at, ranks = 0, {i: rank for rank, i in enumerate(step.twice)}
        for times, row, prefix in step.children:
            size = sizes[times][row]
            prefix.hidden = hidden.narrow(1, at, size)
            at += size
            if times and self.cache is not None:
                first = row if times == 1 else step.twice[row]
                chain = (first,) if times == 1 else (first, ranks[first])
                prefix.slots = tuple(
                    tuple(t.narrow(2, begins[number + 1][r], size) for t in pairs[number])
                    for number, r in enumerate(chain)
                )
        return hidden

    # -- what the seams of the model ask for
    def store(self, cache: object, keys: Tensor, values: Tensor) -> None:
        """The cache's update: keys and values [1, heads, T', head_dim] of the pass that is running."""
        self.visit.keys, self.visit.values = keys, values

    def attended(self, module: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, KeyRows]:
        """The keys and values that this pass attends to, and where those of each segment lie."""
        visit = self.visit
        visit.attended = True
        if self.cache is not None and (keys is not visit.keys or values is not visit.values):
            raise NotImplementedError(
                f"{type(module).__name__} changes keys or values between the cache and the attention: answers cannot "
                "be decoded, choices can be scored"
            )
        index, new, starts, held = self._segments_of(visit.prompts)
        if index is not None:
            index = index.to(keys.device)
            keys, values = keys.index_select(2, index), values.index_select(2, index)
        return keys, values, KeyRows(new, starts, held, self._tables, self._layouts, visit.prompts)

    def _segments_of(self, prompts: tuple[int, ...]) -> tuple[Tensor | None, list[int], list[int], list[int]]:
        """For rows of these prompts: which tokens are the keys (None: each its own, once), and the segments' layout."""
        if prompts not in self._segments:
            new, held, index, at = [], [], [], 0
            for q in prompts:
                trie = self.prompts[q]
                new += trie.lengths
                held += trie.held
                index.append(trie.keys + at)
                at += len(trie)
            alone = all(len(self.prompts[q].lengths) == 1 for q in prompts)
            keys = None if alone else torch.cat(index).to(self.device)
            self._segments[prompts] = (keys, new, [0, *accumulate(held[:-1])], held)
        return self._segments[prompts]

    def _part(self, argument: object, prompts: tuple[int, ...]) -> object:
        """The part of a layer's argument, made for the prompts' tokens, that belongs to rows of `prompts`."""
        if isinstance(argument, Tensor):
            if argument.ndim < 2 or argument.shape[1] != self._begins[-1] or argument.shape == NO_MASK:
                return argument
            key = (id(argument), prompts, argument.device)
            if key not in self._parts:  # the argument is kept beside its part, or its id could be given away
                self._parts[key] = (argument, argument.index_select(1, self._subset(prompts).to(argument.device)))
            return self._parts[key][1]
        if isinstance(argument, tuple | list):
            return type(argument)(self._part(a, prompts) for a in argument)
        if isinstance(argument, dict):
            return {k: self._part(a, prompts) for k, a in argument.items()}
        return argument

    def _subset(self, prompts: tuple[int, ...]) -> Tensor:
        if prompts not in self._subsets:
            parts = [torch.arange(self._begins[q], self._begins[q + 1], device="cpu") for q in range(len(self.prompts))]
            self._subsets[prompts] = torch.cat([parts[q] for q in prompts]).to(self.device)
        return self._subsets[prompts]

    def _check(self, out: object) -> None:
        if not isinstance(out, Tensor):
            raise NotImplementedError(
                f"this model cannot be searched: its layers return {type(out).__name__} instead of a tensor"
            )
        if not self.visit.attended:
            raise NotImplementedError(
                "this model cannot be searched: its attention does not go through transformers' AttentionInterface"
            )


def _rows(x: Tensor, chosen: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Some rows of x [1, T, ...], whose rows have these lengths."""
    if list(chosen) == list(range(len(lengths))):
        return x
    if not chosen:
        return x[:, :0]
    begins = [0, *accumulate(lengths)]
    return torch.cat([x.narrow(1, begins[i], lengths[i]) for i in chosen], dim=1)
