"""Requests to score paths of prompts, as pieces that fit into a forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from drllm_fast.search.paths import LayerPath
from drllm_fast.search.token_trie import TokenTrie

Place = tuple[int, int]  # of a result: number of the request, and of the path in it


class EncodedPrompt:
    """The tokens of a prompt, from pairs (context, continuation), and what is to be predicted where.

    trie     of the contexts and all tokens of the continuations but the last, which predicts nothing
    at       numbers of the trie's tokens whose predictions are wanted, each once; after the context if no continuation
             has a token
    targets  (index into `at`, token id, choice) of each token of each continuation
    choices  how many continuations
    """

    def __init__(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]):
        self.trie = TokenTrie([[*context, *answer[:-1]] for context, answer in pairs])
        rank: dict[int, int] = {}
        self.targets: list[tuple[int, int, int]] = []
        for choice, ((context, answer), nodes) in enumerate(zip(pairs, self.trie.nodes, strict=True)):
            for step, token in enumerate(answer):
                node = nodes[len(context) - 1 + step]
                self.targets.append((rank.setdefault(node, len(rank)), token, choice))
            if not answer:
                rank.setdefault(nodes[-1], len(rank))
        self.at = list(rank)
        self.choices = len(pairs)


@dataclass
class Piece:
    """Distinct paths of one prompt in one forward, and for each of them the places of its results."""

    prompt: EncodedPrompt
    paths: list[LayerPath]
    places: list[list[Place]]


def batches(
    prompts: Sequence[EncodedPrompt], plans: Sequence[Sequence[LayerPath]], max_tokens: int
) -> Iterator[list[Piece]]:
    """The requests, paths `plans[i]` of `prompts[i]`, as forwards of at most max_tokens tokens at their widest (of one
    path, where that is longer). What is asked twice is run once; paths that begin alike stay together."""
    wanted: dict[EncodedPrompt, dict[LayerPath, list[Place]]] = {}
    for request, (prompt, plan) in enumerate(zip(prompts, plans, strict=True)):
        for place, path in enumerate(plan):
            wanted.setdefault(prompt, {}).setdefault(path, []).append((request, place))
    pieces: list[Piece] = []
    tokens = 0
    for prompt, places in wanted.items():
        for path in sorted(places):
            if pieces and tokens + len(prompt.trie) > max_tokens:
                yield pieces
                pieces, tokens = [], 0
            if not pieces or pieces[-1].prompt is not prompt:
                pieces.append(Piece(prompt, [], []))
            pieces[-1].paths.append(path)
            pieces[-1].places.append(places[path])
            tokens += len(prompt.trie)
    if pieces:
        yield pieces
