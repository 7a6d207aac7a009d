"""Searches by ask and tell, so that the searches of many prompts can share a batch of forwards.

    search = make_searcher(config, num_layers, dense, seed)
    while not search.done:
        for path in search.ask(config.leaves):
            search.tell(path, evaluate(path))

A simulation is one path evaluated: no path is asked twice, and `config.simulations` bounds the number of asked paths.
The dense path is evaluated before and not counted. Where a search comes again upon a path that it knows, it goes on to
one that it does not know, which costs no simulation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Protocol

from drllm_fast.search.base import BaseSearch, BlockWeights, Outcome
from drllm_fast.search.beam import BeamSearch
from drllm_fast.search.chain import ChainSearch
from drllm_fast.search.mcts import TreeSearch
from drllm_fast.search.paths import LayerPath
from drllm_fast.search.policy_gradient import PolicyGradientSearch
from drllm_fast.search.random_search import RandomSearch
from drllm_fast.search.spread import SpreadSearch
from drllm_fast.search.unit import SearchConfig

__all__ = ["METHODS", "BlockWeights", "Outcome", "Searcher", "make_searcher"]

METHODS: dict[str, type[BaseSearch]] = {
    "mcts": TreeSearch,
    "chain": ChainSearch,
    "random": RandomSearch,
    "beam": BeamSearch,
    "policy-gradient": PolicyGradientSearch,
    "spread": SpreadSearch,
}


class Searcher(Protocol):
    """One prompt's search. What it asks depends on its arguments, the sizes asked for and what it is told alone."""

    @property
    def done(self) -> bool:
        """Whether nothing will be asked any more and nothing asked is untold, or the search has stopped early. A search
        that runs out of paths before it has asked `simulations` is done once an `ask` has found none."""
        ...

    def ask(self, n: int) -> list[LayerPath]:
        """Up to n paths to evaluate now, each never asked before; fewer or none where the search has to be told
        something first, or has ended. ValueError for a negative n."""
        ...

    def tell(self, path: LayerPath, outcome: Outcome) -> None:
        """Give the outcome of an asked path, in any order, also after an early stop. ValueError for a path that was
        not asked or is told already, and for a reward that is not finite."""
        ...


def make_searcher(
    config: SearchConfig,
    num_layers: int,
    dense: Outcome,
    seed: int,
    prior: Sequence[BlockWeights] | None = None,
) -> Searcher:
    """The search that `config.method` names; a key of METHODS.

    num_layers  L
    dense       outcome of the dense path
    prior       L pairs of weights, as `drllm_fast.search.priors.edit_prior` gives them; required with `config.prior`

    ValueError for values that make no search.
    """
    if config.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {config.method!r}")
    if type(config.simulations) is not int or config.simulations < 0:
        raise ValueError(f"simulations must be an integer of 0 or more, got {config.simulations!r}")
    _require("exploration", config.exploration, 0)
    _require("length_penalty", config.length_penalty, 0)
    _require("random_child", config.random_child, 0, 1)
    _require("max_length", config.max_length, 1)
    if type(num_layers) is not int or num_layers < 1:
        raise ValueError(f"num_layers must be an integer of 1 or more, got {num_layers!r}")
    if not math.isfinite(dense.reward):
        raise ValueError(f"the reward of the dense path must be a finite number, got {dense.reward}")
    if (prior is None) != (config.prior == "none"):
        given = "no weights" if prior is None else "weights"
        raise ValueError(f"config.prior is {config.prior!r}, but {given} were given; see priors.edit_prior")
    if prior is not None:
        if len(prior) != num_layers or any(len(pair) != 2 for pair in prior):
            raise ValueError(
                f"prior must hold a pair (skip, repeat) for each of {num_layers} blocks, got {prior!r:.80}"
            )
        for weight in (weight for pair in prior for weight in pair):
            _require("a weight of the prior", weight, 0)
    return METHODS[config.method](config, num_layers, dense, seed, prior)


def _require(name: str, value: float, least: float, most: float = math.inf) -> None:
    bad_type = isinstance(value, bool) or not isinstance(value, Real)
    if bad_type or not math.isfinite(value) or not least <= value <= most:
        wanted = f"{least} or more" if most == math.inf else f"between {least} and {most}"
        raise ValueError(f"{name} must be a finite number, {wanted}, got {value!r}")
