"""What is compared: for every contender a layer path for each item.

    dense     all blocks, once
    routers   what the routers choose at a budget; they read the prompt, never an answer
    static    a mask that no item chooses, blocks left out in the order of a ranking
    random    masks that leave out as many blocks, drawn blindly

A static or random mask stands beside a row of the routers and runs as many visits on each task: as the routers' mean is
no whole number, some of the items, drawn by the seed, run one block more than the others. Without routers the budgets
themselves say how many blocks are left out.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from drllm_fast.decoder import decoder_of, unwrap
from drllm_fast.evaluation.outcomes import group_of
from drllm_fast.influence import CRITERIA, StaticPolicy, skipped_blocks
from drllm_fast.paths import route_paths
from drllm_fast.router_reference import EXECUTE, SKIP
from drllm_fast.routing import set_budget
from drllm_fast.search.paths import LayerPath, dense_path, visits
from drllm_fast.search.tokens import encode_context
from drllm_fast.search.unit import Item

BUDGETS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


@dataclass(frozen=True)
class Contender:
    """A way to run the model.

    kind    "dense", "routers", "static" or "random"
    name    what tells contenders of one kind apart, such as the criterion of a static mask
    budget  the share of the L visits that was asked for, None of the dense model
    paths   one for each item; of a static or random mask two for the items of a task, one block apart
    """

    kind: str
    name: str
    budget: float | None
    paths: tuple[LayerPath, ...]


def dense(items: Sequence[Item], num_layers: int) -> Contender:
    return Contender("dense", "dense", None, (dense_path(num_layers),) * len(items))


def routed(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    routers: Any,
    budgets: Sequence[float],
    *,
    max_tokens: int = 8192,
    progress: bool = False,
) -> list[Contender]:
    """The routers at each budget.

    routers     a policy with a property `budget`, which has its old value afterwards
    max_tokens  of a forward

    Raises ValueError for a policy without a budget, and whatever it raises for a budget it cannot keep or for a model
    that is not its own.
    """
    contexts = [context_tokens(tokenizer, item) for item in items]
    distinct = {context: number for number, context in enumerate(dict.fromkeys(contexts))}
    before = getattr(routers, "budget", None)
    found = []
    try:
        for budget in budgets:  # whatever is refused is refused before work has begun
            set_budget(routers, budget)
        for budget in tqdm(budgets, desc="routing prompts, by budget", disable=not progress):
            set_budget(routers, budget)
            plan = route_paths(model, list(distinct), routers, max_tokens=max_tokens).tolist()
            found.append(Contender("routers", "routers", budget, tuple(tuple(plan[distinct[c]]) for c in contexts)))
    finally:
        if hasattr(routers, "budget"):
            routers.budget = before
    return found


def context_tokens(tokenizer: Any, item: Item) -> tuple[int, ...]:
    """What a policy may read of an item: the tokens before its answer, alike for all of its choices."""
    return tuple(encode_context(tokenizer, item.prompt, choices=item.choices is not None))


def sizes(
    items: Sequence[Item], num_layers: int, budgets: Sequence[float], routers: Sequence[Contender], seed: int = 0
) -> dict[float, list[int]]:
    """By budget, how many blocks a mask leaves out for each item: on each task as many in all as the routers do (none
    where they run more than L, all but one where they run less), or what the budget says where there are no routers."""
    if not routers:
        return {budget: [skipped_blocks(budget, num_layers)] * len(items) for budget in budgets}
    groups = [group_of(item) for item in items]
    found: dict[float, list[int]] = {}
    for contender in routers:
        left_out = [0] * len(items)
        for group in dict.fromkeys(groups):
            members = [number for number, other in enumerate(groups) if other == group]
            run = sum(visits(contender.paths[number]) for number in members)
            each, more = divmod(min(max(run, len(members)), num_layers * len(members)), len(members))
            drawn = sorted(members, key=lambda i: hashlib.sha256(f"{seed}/{items[i].id}".encode()).digest())
            longer = set(drawn[:more])  # by a hash, so that the order of the items does not matter
            for number in members:
                left_out[number] = num_layers - each - (number in longer)
        found[contender.budget] = left_out
    return found


def masked(
    kind: str, name: str, num_layers: int, sizes: Mapping[float, Sequence[int]], order: Mapping[int, Sequence[int]]
) -> list[Contender]:
    """Masks of the wanted sizes, one contender a budget. order: for each size the blocks to leave out."""
    return [
        Contender(kind, name, budget, tuple(mask(order[size], num_layers) for size in each))
        for budget, each in sizes.items()
    ]


def mask(blocks: Iterable[int], num_layers: int) -> LayerPath:
    left_out = set(blocks)
    return tuple(SKIP if block in left_out else EXECUTE for block in range(num_layers))


def random_orders(num_layers: int, sizes: Iterable[int], seed: int, number: int) -> dict[int, list[int]]:
    """For each size the blocks of the random mask `number`; those of one size do not depend on the other sizes."""
    return {
        size: random.Random(f"{seed}/{number}/{size}").sample(range(num_layers), size) for size in dict.fromkeys(sizes)
    }


def rankings(static: Sequence[str | Path | StaticPolicy], model: nn.Module) -> dict[str, str | StaticPolicy]:
    """What is to be compared as static masks, by name: a criterion to calibrate by, or a policy that is there.

    static  criteria ("block-influence", "cka"), files that `StaticPolicy.save` wrote, or policies

    Raises ValueError for an unknown criterion, two of one name, and a policy of another model; OSError for a file.
    """
    found: dict[str, str | StaticPolicy] = {}
    for given in static:
        value: str | StaticPolicy
        if isinstance(given, StaticPolicy):
            name, value = given.criterion, given
        elif str(given).endswith(".json"):
            name, value = Path(given).stem, StaticPolicy.load(given)
        elif given in CRITERIA:
            name = value = str(given)
        else:
            raise ValueError(
                f"static mask {str(given)!r}: write {' or '.join(CRITERIA)}, or the .json file of a static policy"
            )
        if name in found:
            raise ValueError(f"two static masks are named {name!r}; rename a file, or leave one out")
        if isinstance(value, StaticPolicy):
            value.bind(model)
        found[name] = value
    return found


def contenders(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    budgets: Sequence[float] = BUDGETS,
    routers: Any = None,
    static: Sequence[str | Path | StaticPolicy] = (),
    random_masks: int = 0,
    seed: int = 0,
    max_tokens: int = 8192,
    progress: bool = False,
) -> list[Contender]:
    """All contenders, the dense model first; of random masks one contender for each of `random_masks` draws.

    Static masks are calibrated on the bundled text, the model being unrouted. Raises ValueError for budgets outside
    (0, 1] or that leave no block, and as the functions above.
    """
    layers = len(decoder_of(unwrap(model)).layers)
    for budget in budgets:
        skipped_blocks(budget, layers)
    ranked = rankings(static, model)
    found = [dense(items, layers)]
    if routers is not None:
        found += routed(model, tokenizer, items, routers, budgets, max_tokens=max_tokens, progress=progress)
    wanted = sizes(items, layers, budgets, found[1:], seed)
    left_out = sorted({size for each in wanted.values() for size in each})
    for name, ranking in ranked.items():
        if isinstance(ranking, str):
            ranking = StaticPolicy.calibrate(
                model, tokenizer, budget=1 - left_out[-1] / layers, criterion=ranking, progress=progress
            )
        if left_out[-1] > len(ranking.order):
            raise ValueError(
                f"the static policy {name!r} ranks {len(ranking.order)} of {layers} blocks, and {left_out[-1]} are to "
                f"be left out; calibrate it with budget={1 - left_out[-1] / layers:.3g}, or ask for larger budgets"
            )
        order = {size: ranking.order[:size] for size in left_out}
        found += masked("static", name, layers, wanted, order)
    for number in range(random_masks):
        order = random_orders(layers, left_out, seed, number)
        found += masked("random", "random", layers, wanted, order)
    return found
