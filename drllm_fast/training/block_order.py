"""The order of blocks of one kind of prompts, as a file, and a training set for routers made of several of them.

Within a kind, what a prompt shows says little about what leaving out a block will cost it; between kinds (questions,
running text, arithmetic) much. So blocks are ordered for each kind, by measuring (`drllm_fast.training.elimination`),
and routers learn to tell kinds apart: for each prompt the places in the order of its kind
(`drllm_fast.training.orders`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drllm_fast import fingerprint
from drllm_fast.decoder import decoder_of
from drllm_fast.influence import StaticPolicy
from drllm_fast.search.tasks import evenly
from drllm_fast.training.orders import Orders, PlaceObjective, spread_steps
from drllm_fast.training.price_lesson import Lesson, along

FILE = "order.json"
FORMAT = {"format": "drllm-fast block order", "version": 1}


@dataclass(frozen=True)
class BlockOrder:
    """In which order blocks are best left out, and repeated, for prompts of one kind.

    kind                       a name, without a slash
    model, fingerprint         of the model that was measured
    tasks, label_weight        what was measured, on how many prompts
    measured
    skips, repeats             blocks in order
    skip_costs, repeat_costs   nats, of the paths on the way
    prompts                    token ids of prompts of the kind, for routers to learn from

    Raises ValueError for a kind with a slash, which parts a task from its level.
    """

    kind: str
    model: str
    fingerprint: dict[str, Any]
    tasks: tuple[str, ...]
    label_weight: float
    measured: int
    skips: tuple[int, ...]
    skip_costs: tuple[float, ...]
    repeats: tuple[int, ...]
    repeat_costs: tuple[float, ...]
    prompts: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        check_kind(self.kind)

    @property
    def num_layers(self) -> int:
        return self.fingerprint["structure"]["num_layers"]

    def static(self) -> StaticPolicy:
        """The order as one mask for all prompts."""
        return StaticPolicy(self.skips, num_layers=self.num_layers, budget=1.0, criterion="elimination")

    def save(self, folder: Path) -> None:
        """Write `order.json` into the folder, at once or not at all."""
        from drllm_fast.atomic import written

        with written(folder / FILE) as out:
            out.write((json.dumps(FORMAT | asdict(self)) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> BlockOrder:
        """OSError for a folder without an order or a damaged one, ValueError for what this version does not read."""
        file = Path(folder) / FILE
        if not file.is_file():
            raise OSError(f"{folder} holds no order of blocks ({FILE}); make one with drllm-fast order")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OSError(f"{file} is damaged: {error}; make it again with drllm-fast order") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or {key: data.pop(key, None) for key in FORMAT} != FORMAT or data.keys() != names:
            raise ValueError(f"{file} holds no order of blocks that this version reads; make it again")
        return cls(**{name: _tuples(value) for name, value in data.items()})


def check_kind(name: str) -> None:
    """ValueError for a name that no kind can have."""
    if not name or "/" in name:
        raise ValueError(f"a kind needs a name without a slash, got {name!r}; give another one (--kind)")


def order_lesson(
    model: nn.Module,
    orders: Sequence[BlockOrder],
    *,
    lengths: int = 3,
    least: int = 500,
    limit: int | None = None,
    seed: int = 0,
) -> Lesson:
    """What to teach routers of `model`, from the orders of several kinds of prompts.

    lengths  paths of different lengths for each prompt
    least    examples of each kind; of one with fewer prompts each is read along more lengths, and again if need be

    limit    at most so many prompts of each kind, at even distances

    Sequences of different lengths are cut to the shortest. Raises ValueError for no orders, for orders of another
    model, for two of one name, and for a prompt of two kinds.
    """
    if not orders:
        raise ValueError("there are no orders to learn; give at least one, better one for each kind of prompts")
    layers = len(decoder_of(model).layers)
    homes: dict[tuple[int, ...], str] = {}
    for order in orders:
        try:
            fingerprint.check(model, order.fingerprint)
        except ValueError as error:
            raise ValueError(
                f"the order of {order.kind} is of {order.model}: {error}. Measure this model, or load that one"
            ) from error
        if order.kind in homes.values():
            raise ValueError(f"two orders are of the kind {order.kind!r}; name one differently (--kind)")
        for prompt in evenly(list(order.prompts), limit):
            if (home := homes.setdefault(prompt, order.kind)) != order.kind:
                raise ValueError(f"a prompt is in {home} and in {order.kind}; a kind must have prompts of its own")
    skips = min(len(order.skips) for order in orders)
    repeats = min(len(order.repeats) for order in orders)
    if lengths > skips + repeats + 1:
        raise ValueError(f"lengths={lengths}, but there are only {skips + repeats + 1} lengths of path to choose from")
    by_kind = {order.kind: order for order in orders}
    each = Orders(
        layers,
        torch.tensor([by_kind[kind].skips[:skips] for kind in homes.values()]),
        torch.tensor([by_kind[kind].repeats[:repeats] for kind in homes.values()], dtype=torch.int64),
    )
    tokens, kinds = list(homes), list(homes.values())
    rows, steps = spread_steps(kinds, skips=skips, repeats=repeats, each=lengths, least=least, seed=seed)
    about = {
        "learnt": "places of blocks in the order of a prompt's kind",
        "kinds": {
            order.kind: {
                "tasks": order.tasks, "label_weight": order.label_weight, "measured": order.measured,
                "skips": order.skips, "skip_costs": order.skip_costs,
                "repeats": order.repeats, "repeat_costs": order.repeat_costs,
            }
            for order in orders
        },
    }  # fmt: skip
    return Lesson(
        along(tokens, kinds, each, rows, steps), each.places()[rows], PlaceObjective(skips, repeats), None, about
    )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
