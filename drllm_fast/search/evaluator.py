"""Scoring many layer paths of a prompt at once, exactly: what paths share is run once.

A forward is a tree of path prefixes (`path_tree`), its rows are trees of tokens (`token_trie`), and the states that it
leaves behind serve the next one (`prefix_store`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drllm_fast.active import ACTIVE
from drllm_fast.attention import NO_MASK
from drllm_fast.base_forward import name_of_cache
from drllm_fast.cache import RoutedCache
from drllm_fast.decoder import routable_decoder, row_positions, unwrap
from drllm_fast.enable import disable_dynamic_routing, enable_dynamic_routing
from drllm_fast.influence import evaluating
from drllm_fast.policies import as_plan, check_length
from drllm_fast.search.batches import EncodedPrompt, Piece, batches
from drllm_fast.search.path_tree import PathTree, Prefix
from drllm_fast.search.paths import LayerPath, visits
from drllm_fast.search.prefix_store import PrefixStore
from drllm_fast.search.tokens import encode_pair, encode_prompt
from drllm_fast.search.tree_decode import decode, fill_cache
from drllm_fast.search.tree_forward import TreeForward
from drllm_fast.settings import changed

# Prompts whose tokens, and whose place in the store, are remembered.
PROMPTS = 256


@dataclass
class EvaluatorStats:
    """Counted over the life of an evaluator. A visit is one block run for one prompt under one path.

    paths         paths scored or decoded
    forwards      forwards of the model that prefilled them
    visits        visits run
    visits_alone  visits of the same paths run one by one
    restored      path prefixes taken from the store
    """

    paths: int = 0
    forwards: int = 0
    visits: int = 0
    visits_alone: int = 0
    restored: int = 0


class PathEvaluator:
    """Evaluates layer paths of a causal language model from transformers.

    model            unrouted, or routed (its policy is not asked)
    tokenizer        its own
    store_bytes      of states kept between calls; 0 keeps none
    max_tokens       of a forward at its widest; more paths are run in several
    max_logits       bytes of logits made at once

    positions        how many tokens a row may have; None where the model sets no limit

    The model is routed while a call runs, and left as it was. Not for several threads at once. States are kept as long
    as dtype, device and autocast stay the same; call `store.clear()` when weights or adapters have changed.
    Raises what `enable_dynamic_routing` does for a model that cannot be routed exactly.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        store_bytes: int = 1 << 30,
        max_tokens: int = 8192,
        max_logits: int = 1 << 28,
    ):
        self.top = unwrap(model)
        self.decoder = routable_decoder(self.top)
        self.tokenizer = tokenizer
        self.num_layers = len(self.decoder.layers)
        self.store = PrefixStore(store_bytes)
        if max_tokens < 1 or max_logits < 1:
            raise ValueError(f"max_tokens and max_logits must be positive, got {max_tokens} and {max_logits}")
        self.max_tokens, self.max_logits = max_tokens, max_logits
        self.positions = row_positions(self.decoder.config)
        if getattr(self.decoder.config, "output_router_logits", False):
            raise NotImplementedError(
                "output_router_logits=True in the model's config is not supported; set it to False"
            )
        self.stats = EvaluatorStats()
        self._prompts: OrderedDict[tuple, EncodedPrompt] = OrderedDict()
        self._arithmetic: tuple | None = None  # of the states in the store

    @property
    def device(self) -> torch.device:
        return self.decoder.get_input_embeddings().weight.device

    # -- scoring answer choices
    def score_choices(self, context: str, choices: Sequence[str], paths: Any) -> Tensor:
        """float32 [P, C] on the CPU: the sum of log-likelihoods of the tokens of each of C choices after the context,
        under each of P paths ([L] or [P, L] of 0 skip, 1 execute, 2 repeat). Tokens as lm-eval makes them.

        The context and whatever the choices' tokens have in common is run once for each path, whatever paths have in
        common once for all of them.
        Raises TypeError or ValueError for paths that do not fit, choices without a token and prompts longer than the
        model's positions.
        """
        return self.score_many([(context, choices, paths)])[0]

    def score_many(self, requests: Sequence[tuple[str, Sequence[str], Any]]) -> list[Tensor]:
        """`score_choices` of several prompts, in shared forwards."""
        prompts = [self._choices(context, choices) for context, choices, _ in requests]
        plans = [self._paths(paths) for _, _, paths in requests]
        out = [
            torch.zeros(len(plan), prompt.choices, dtype=torch.float32, device="cpu")
            for plan, prompt in zip(plans, prompts, strict=True)
        ]
        with self._routed(), torch.inference_mode():
            for piece, row, logp in self._log_probs(batches(prompts, plans, self.max_tokens)):
                index, tokens, choice = torch.tensor(piece.prompt.targets, device="cpu").T
                told = logp[index.to(logp.device), tokens.to(logp.device)].cpu()
                for request, place in piece.places[row]:
                    out[request][place].index_add_(0, choice, told)
        return out

    def score_tokens(
        self, requests: Sequence[tuple[Sequence[tuple[Sequence[int], Sequence[int]]], Any]]
    ) -> list[tuple[Tensor, Tensor]]:
        """`score_many` of prompts that are tokens already: C pairs (context, continuation) of token ids, and P paths.

        For each request float32 [P, C], the log-likelihoods of the continuations, and bool [P, C], whether each token
        of the continuation is the model's most probable one. Raises ValueError for a context or continuation without
        tokens, and what `score_choices` raises.
        """
        prompts = [self._pairs(pairs) for pairs, _ in requests]
        plans = [self._paths(paths) for _, paths in requests]
        sizes = [(len(plan), prompt.choices) for plan, prompt in zip(plans, prompts, strict=True)]
        out = [
            (torch.zeros(size, dtype=torch.float32, device="cpu"), torch.ones(size, dtype=torch.bool, device="cpu"))
            for size in sizes
        ]
        with self._routed(), torch.inference_mode():
            for piece, row, logp in self._log_probs(batches(prompts, plans, self.max_tokens)):
                index, tokens, choice = torch.tensor(piece.prompt.targets, device="cpu").T
                told = logp[index.to(logp.device), tokens.to(logp.device)].cpu()
                missed = choice[logp.argmax(-1).cpu()[index] != tokens]
                for request, place in piece.places[row]:
                    scores, greedy = out[request]
                    scores[place].index_add_(0, choice, told)
                    greedy[place, missed] = False
        return out

    def divergence(self, context: str, choices: Sequence[str], paths: Any) -> Tensor:
        """float32 [P]: KL(dense || path) of the model's distributions of the next token, in nats, its mean over the
        places where `score_choices` predicts a token of a choice. No right answer is needed."""
        return self.measure_many([(context, choices, paths)])[0][1]

    def measure_many(self, requests: Sequence[tuple[str, Sequence[str], Any]]) -> list[tuple[Tensor, Tensor]]:
        """`score_choices` and `divergence` of several prompts, from the same forwards."""
        prompts = [self._choices(context, choices) for context, choices, _ in requests]
        plans = [self._paths(paths) for _, _, paths in requests]
        out = [
            tuple(
                torch.zeros(size, dtype=torch.float32, device="cpu")
                for size in ((len(plan), prompt.choices), len(plan))
            )
            for plan, prompt in zip(plans, prompts, strict=True)
        ]
        dense = [(1,) * self.num_layers]
        with self._routed(), torch.inference_mode():
            for some in batches(prompts, plans, self.max_tokens):
                alone = batches([piece.prompt for piece in some], [dense] * len(some), self.max_tokens)
                # KL = sum p log p - sum p log q, the first of which is the same for all paths.
                references = {
                    piece.prompt: (torch.linalg.vecdot(logp.exp(), logp), logp.exp())
                    for piece, _, logp in self._log_probs(alone, count=False)
                }
                for piece, row, logp in self._log_probs([some]):
                    negentropy, reference = references[piece.prompt]
                    index, tokens, choice = torch.tensor(piece.prompt.targets, device="cpu").T
                    told = logp[index.to(logp.device), tokens.to(logp.device)].cpu()
                    kl = (negentropy - torch.linalg.vecdot(reference, logp)).mean()
                    for request, place in piece.places[row]:
                        out[request][0][place].index_add_(0, choice, told)
                        out[request][1][place] = kl
        return out

    # -- free answers
    def greedy(self, prompt: str, paths: Any, max_new_tokens: int, *, stop: Sequence[str] = ()) -> list[list[int]]:
        """For each path the tokens of the model's greedy answer to `prompt`, without the end-of-sequence token; at most
        max_new_tokens, or up to and with the token that completes one of the texts `stop`."""
        return self.greedy_many([(prompt, paths)], max_new_tokens, stop=stop)[0]

    def greedy_many(
        self, requests: Sequence[tuple[str, Any]], max_new_tokens: int, *, stop: Sequence[str] = ()
    ) -> list[list[list[int]]]:
        """`greedy` of several prompts, in shared forwards."""
        _check_ends(max_new_tokens, stop)
        prompts = [self._free(prompt, max_new_tokens) for prompt, _ in requests]
        return self._greedy(prompts, [paths for _, paths in requests], max_new_tokens, stop)

    def greedy_tokens(
        self, requests: Sequence[tuple[Sequence[int], Any]], max_new_tokens: int, *, stop: Sequence[str] = ()
    ) -> list[list[list[int]]]:
        """`greedy_many` of prompts that are token ids already, none of them empty."""
        _check_ends(max_new_tokens, stop)
        prompts = [self._pairs([(prompt, ())], room=max_new_tokens) for prompt, _ in requests]
        return self._greedy(prompts, [paths for _, paths in requests], max_new_tokens, stop)

    def _greedy(
        self, prompts: Sequence[EncodedPrompt], paths: Sequence[Any], max_new_tokens: int, stop: Sequence[str]
    ) -> list[list[list[int]]]:
        plans = [self._paths(some) for some in paths]
        out: list[list[list[int]]] = [[[] for _ in plan] for plan in plans]
        with self._routed(), torch.inference_mode():
            for pieces in batches(prompts, plans, self.max_tokens):
                cache, first = self._prefill(pieces)
                answers = decode(self.top, self.tokenizer, cache, first, max_new_tokens, stop)
                rows = [places for piece in pieces for places in piece.places]
                for places, answer in zip(rows, answers, strict=True):
                    for request, place in places:
                        out[request][place] = list(answer)
        return out

    def forget(self, context: str, choices: Sequence[str] | None = None) -> None:
        """Drop the states kept for a prompt that will not come back."""
        prompt = self._prompts.pop((context, None if choices is None else tuple(choices)), None)
        if prompt is not None:
            self.store.forget(prompt)

    # -- inside
    def _choices(self, context: str, choices: Sequence[str]) -> EncodedPrompt:
        if isinstance(choices, str) or not choices:
            raise ValueError(f"choices must be a list of one or more texts, got {choices!r:.80}")

        def make() -> list[tuple[list[int], list[int]]]:
            pairs = [encode_pair(self.tokenizer, context, choice) for choice in choices]
            for choice, (_, answer) in zip(choices, pairs, strict=True):
                if not answer:
                    raise ValueError(f"the choice {choice!r} has no token after the context")
            return pairs

        return self._remembered((context, tuple(choices)), make, 0)

    def _free(self, prompt: str, room: int) -> EncodedPrompt:
        # Never one that choices are scored of, so that its states in the store all have their keys and values.
        return self._remembered((prompt, None), lambda: [(encode_prompt(self.tokenizer, prompt), [])], room)

    def _pairs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], room: int = 0) -> EncodedPrompt:
        """Room for an answer is asked for where the continuation is still to be written, and empty."""
        key = tuple((tuple(context), tuple(answer)) for context, answer in pairs)
        if not key or not all(context and (answer or room) for context, answer in key):
            raise ValueError(f"every context and continuation needs a token, got {key!r:.80}")
        return self._remembered((key, None), lambda: key, room)

    def _remembered(self, key: tuple, make: Any, room: int) -> EncodedPrompt:
        if key not in self._prompts:
            self._prompts[key] = EncodedPrompt(make())
            while len(self._prompts) > PROMPTS:
                _, old = self._prompts.popitem(last=False)
                self.store.forget(old)
        self._prompts.move_to_end(key)
        prompt = self._prompts[key]
        limit = self.positions
        if limit is not None and max(prompt.trie.positions) + 1 + room > limit:
            raise ValueError(
                f"a prompt of {max(prompt.trie.positions) + 1} tokens{f' and {room} of its answer' if room else ''} "
                f"exceeds the model's {limit} positions; shorten it: {key[0]!r:.80}"
            )
        return prompt

    def _paths(self, paths: Any) -> list[LayerPath]:
        plan = as_plan(paths)
        check_length(plan, self.num_layers)
        return list(map(tuple, (plan.unsqueeze(0) if plan.ndim == 1 else plan).tolist()))

    def _start(self, pieces: Sequence[Piece], cache: object, count: bool) -> TreeForward:
        starts, alone = [], 0
        for q, piece in enumerate(pieces):
            root = Prefix((), None, q)
            own = [self.store.deepest(piece.prompt, path) or root for path in piece.paths]
            for prefix in own:
                prefix.prompt = q
            starts.append(own)
            alone += sum(map(visits, piece.paths))
        tree = PathTree([piece.paths for piece in pieces], starts, self.num_layers)
        if count:
            self.stats.paths += sum(len(piece.paths) for piece in pieces)
            self.stats.forwards += 1
            self.stats.visits_alone += alone
            self.stats.restored += len({id(prefix) for own in starts for prefix in own if prefix.path})
        return TreeForward(self.decoder._drllm_routing, [p.prompt.trie for p in pieces], tree, cache, self.device)

    def _run(self, run: TreeForward, index: Tensor) -> Tensor:
        """Logits [1, n, V] at the tokens `index` of the rows that leave the last block."""
        token = ACTIVE.set(run)
        try:
            ids, positions = run.inputs()
            cache = {} if run.cache is None else {name_of_cache(type(self.top).forward): run.cache}
            return self.top(
                input_ids=ids,
                attention_mask=torch.empty(NO_MASK, dtype=torch.bool, device=self.device),
                position_ids=positions,
                use_cache=run.cache is not None,
                logits_to_keep=index,
                return_dict=True,
                **cache,
            ).logits
        finally:
            ACTIVE.reset(token)

    def _log_probs(self, forwards: Iterable[list[Piece]], count: bool = True) -> Iterator[tuple[Piece, int, Tensor]]:
        """Run the pieces of each forward; for each piece and each of its paths: log-probabilities float32 [n, V] at the
        prompt's places. The model is routed and in inference mode around it: a generator that is left in the middle
        would leave both on."""
        for pieces in forwards:
            run = self._start(pieces, None, count)
            offsets = _offsets(run)
            vocabulary = self.top.config.get_text_config(decoder=True).vocab_size
            for q, piece in enumerate(pieces):
                at = torch.tensor(piece.prompt.at, device="cpu")
                group = max(1, self.max_logits // (4 * vocabulary * len(at)))
                for first in range(0, len(piece.paths), group):
                    begins = [offsets[q][path] for path in piece.paths[first : first + group]]
                    index = torch.cat([at + begin for begin in begins]).to(self.device)
                    logits = self._run(run, index)[0]
                    # One path at a time: what is made of its logits then stays in a CPU's cache.
                    for row, some in enumerate(logits.split(len(at)), first):
                        yield piece, row, some.log_softmax(-1, dtype=torch.float32)
            self._keep(run, pieces, count)

    def _prefill(self, pieces: list[Piece]) -> tuple[RoutedCache, Tensor]:
        """A cache that holds each path of each piece as a row, and the logits [rows, V] after the prompt."""
        cache = RoutedCache(self.decoder.config)
        run = self._start(pieces, cache, True)
        offsets = _offsets(run)
        last = [offsets[q][path] + p.prompt.at[0] for q, p in enumerate(pieces) for path in p.paths]
        logits = self._run(run, torch.tensor(last, device=self.device))[0]
        leaves = [run.tree.leaves[q][path] for q, p in enumerate(pieces) for path in p.paths]
        lengths = [len(p.prompt.trie) for p in pieces for _ in p.paths]
        fill_cache(cache, self.decoder, leaves, lengths)
        self._keep(run, pieces, True)
        return cache, logits

    def _keep(self, run: TreeForward, pieces: list[Piece], count: bool) -> None:
        if count:
            self.stats.visits += run.visits
        fresh = [child for step in run.tree.steps for _, _, child in step.children]
        self.store.keep([piece.prompt for piece in pieces], fresh, run.tree.last)

    @contextmanager
    def _routed(self) -> Iterator[None]:
        """The model's seams are there, asking no policy, and its modules in evaluation mode."""
        own = not hasattr(self.decoder, "_drllm_routing")
        if own:
            enable_dynamic_routing(self.top, [1] * self.num_layers)
        weight, kind = self.decoder.get_input_embeddings().weight, self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if (arithmetic := (weight.dtype, weight.device, autocast)) != self._arithmetic:
            self._arithmetic = arithmetic
            self.store.clear()
        routing = self.decoder._drllm_routing
        last = routing.last
        try:
            with changed(routing, disabled=False, plan=None, context=None), evaluating(self.top):
                yield
        finally:
            routing.last = last
            if own:
                disable_dynamic_routing(self.top)


def _check_ends(max_new_tokens: int, stop: Sequence[str]) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop must be a list of texts, none of them empty, got {stop!r:.80}")


def _offsets(run: TreeForward) -> list[dict[LayerPath, int]]:
    """For each prompt and path of a forward, where its row begins among those that leave the last block."""
    offsets: list[dict[LayerPath, int]] = [{} for _ in run.prompts]
    at = 0
    for leaf in run.tree.last:
        offsets[leaf.prompt][leaf.path] = at
        at += len(run.prompts[leaf.prompt])
    return offsets
