"""Which blocks a kind of prompts can best do without, one after the other, by measuring.

From the dense path on, every block that is still there is tried for the next to be left out, and the one whose path
costs least stays out: greedy elimination, as in SLEB (arXiv 2402.09025), with a few sequences kept instead of one.
What a path costs, mean over the prompts:

    (1 - label_weight) KL(dense || path)  +  label_weight (NLL(path) - NLL(dense))

KL of the next token's distribution over the tokens of the choices, or of the right answer; NLL of the right choice
among the choices, softmax of their log-likelihoods, or, where there is one continuation only, of a token of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from drllm_fast import fingerprint
from drllm_fast.atomic import written
from drllm_fast.router_reference import EXECUTE
from drllm_fast.search.evaluator import PathEvaluator
from drllm_fast.search.paths import LayerPath, decode, encode
from drllm_fast.search.tokens import encode_pair
from drllm_fast.search.unit import Item

HEATS = (0.125, 0.5, 1.0)  # shares of the prompts that candidates are measured on, fewer of them each time
SURVIVORS = 0.4  # of a heat
AT_ONCE = 16  # prompts of a call


class PathCosts:
    """The cost of paths on the first so many of `items`; what was measured is not measured again.

    items         in the order in which they are to be measured; shuffled, if sorted by kind
    label_weight  from 0, no labels, to 1, labels alone
    file          keeps what was measured, for the next time

    Raises ValueError for a label_weight outside of 0 to 1, no items, and a file of other items, weights or dtype.
    """

    def __init__(
        self, evaluator: PathEvaluator, items: Sequence[Item], *, label_weight: float = 0.0, file: Path | None = None
    ):
        if not 0 <= label_weight <= 1:
            raise ValueError(f"label_weight must be from 0 (no labels) to 1 (labels alone), got {label_weight}")
        if not items:
            raise ValueError("there are no prompts to measure paths on; give at least one, better hundreds")
        self.evaluator, self.items, self.label_weight, self.file = evaluator, list(items), label_weight, file
        self.dense: LayerPath = (EXECUTE,) * evaluator.num_layers
        self._requests = [_request(item) for item in self.items]
        self._lengths = [_answer_tokens(evaluator, request) for request in self._requests]
        self._known: dict[LayerPath, Tensor] = {}  # [measured items, 2]: KL and NLL
        if file is not None and file.exists():
            self._read()

    def __call__(self, paths: Sequence[LayerPath], count: int | None = None, *, progress: bool = False) -> Tensor:
        """fp32 [P], nats: mean over the first `count` items, by default all."""
        return self.each(paths, count, progress=progress).mean(1)

    def each(self, paths: Sequence[LayerPath], count: int | None = None, *, progress: bool = False) -> Tensor:
        """fp32 [P, count]."""
        count = len(self.items) if count is None else min(count, len(self.items))
        told = self.measures([self.dense, *paths], count, progress=progress)
        kl, nll = told.unbind(-1)
        return ((1 - self.label_weight) * kl + self.label_weight * (nll - nll[0]))[1:]

    def measures(self, paths: Sequence[LayerPath], count: int, *, progress: bool = False) -> Tensor:
        """fp32 [P, count, 2]: KL and NLL of each path on each of the first `count` items."""
        wanted = dict.fromkeys(paths)
        for start in tqdm(range(0, count, AT_ONCE), desc="measuring", leave=False, disable=not progress):
            stop = min(start + AT_ONCE, count)
            # Known are the first so many items of a path.
            missing = [path for path in wanted if len(self._known.get(path, ())) < stop]
            if not missing:
                continue
            found = self.evaluator.measure_many([(*self._requests[i][:2], missing) for i in range(start, stop)])
            rows = torch.stack([self._measures(i, *one) for i, one in zip(range(start, stop), found, strict=True)], 1)
            for path, row in zip(missing, rows, strict=True):
                self._add(path, start, row)
            if self.file is not None:
                self._write(missing, start, rows)
        return torch.stack([self._known[path][:count] for path in paths])

    def _measures(self, number: int, scores: Tensor, kl: Tensor) -> Tensor:
        answer = self._requests[number][2]
        if scores.shape[1] == 1:
            nll = -scores[:, 0] / self._lengths[number]
        else:
            nll = -scores.log_softmax(1)[:, answer]
        return torch.stack([kl, nll], 1)

    # -- what is kept
    def _identity(self) -> str:
        model = self.evaluator.top
        what = (
            self._requests,
            fingerprint.fingerprint(model),
            str(self.evaluator.decoder.get_input_embeddings().weight.dtype),
        )
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    def _add(self, path: LayerPath, start: int, rows: Tensor) -> None:
        self._known[path] = torch.cat([self._known.get(path, rows[:0])[:start], rows])

    def _write(self, paths: Sequence[LayerPath], start: int, rows: Tensor) -> None:
        with self.file.open("a", encoding="utf-8") as out:
            if not out.tell():
                out.write(json.dumps({"of": self._identity()}) + "\n")
            for path, some in zip(paths, rows.tolist(), strict=True):
                out.write(json.dumps({"path": encode(path), "start": start, "measures": some}) + "\n")

    def _read(self) -> None:
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # cut off while it was written
            with written(self.file) as out:
                out.write("".join(lines[:-1]).encode())
            lines.pop()
        rows = [json.loads(line) for line in lines]
        if rows and rows.pop(0).get("of") != self._identity():
            raise ValueError(
                f"{self.file} keeps what paths cost on other prompts, another model or in another dtype; give another "
                "folder, or the same prompts, model and dtype"
            )
        for row in rows:
            self._add(decode(row["path"]), row["start"], torch.tensor(row["measures"]))


def eliminate(
    costs: Callable[..., Tensor],
    *,
    num_layers: int,
    to: int,
    length: int,
    count: int,
    beam: int = 2,
    pool: int | None = None,
    progress: bool = True,
) -> tuple[list[int], list[float]]:
    """`length` blocks in the order in which they are best given the class `to` (skip or repeat), and what the paths
    cost on the way.

    costs  of paths on the first so many of `count` items, as `PathCosts`
    beam   sequences kept. They are compared by the sum of cost_k / k^2 over their lengths k, for a divergence grows
           like the square of a disturbance, and long paths are not all that counts
    pool   only so many blocks, the cheapest when they alone are changed, are tried from the second place on,
           `length` of them at least; None: all

    Raises ValueError for a length of all blocks or more.
    """
    if not 0 <= length < num_layers:
        raise ValueError(
            f"an order of {length} blocks: the model has {num_layers} blocks, of which one must stay as it is"
        )
    blocks = set(range(num_layers))
    kept: list[tuple[float, tuple[int, ...], tuple[float, ...]]] = [(0.0, (), ())]
    with tqdm(range(1, length + 1), desc="eliminating", unit="block", disable=not progress) as bar:
        for k in bar:
            longer: dict[frozenset[int], tuple[float, tuple[int, ...], tuple[float, ...]]] = {}
            for parent in kept:
                for block in blocks - set(parent[1]):
                    key = frozenset((*parent[1], block))
                    if key not in longer or parent[0] < longer[key][0]:
                        longer[key] = (parent[0], (*parent[1], block), parent[2])
            candidates = list(longer.values())
            for heat in HEATS:
                if len(candidates) <= beam and heat < 1:
                    continue
                some = [_path(num_layers, order, to) for _, order, _ in candidates]
                found = costs(some, max(1, round(heat * count)), progress=progress).tolist()
                ranked = sorted(
                    (total + cost / k**2, order, (*way, cost))
                    for (total, order, way), cost in zip(candidates, found, strict=True)
                )
                if k == 1 and heat == HEATS[0] and pool is not None:
                    blocks = {order[-1] for _, order, _ in ranked[: max(pool, length)]}
                if heat < 1:
                    kept_here = max(beam + 1, round(SURVIVORS * len(ranked)))
                    alive = {order for _, order, _ in ranked[:kept_here]}
                    candidates = [one for one in candidates if one[1] in alive]
            kept = ranked[:beam]
            bar.set_postfix_str(f"{kept[0][1][-1]}: {kept[0][2][-1]:.3f} nats")
    return list(kept[0][1]), list(kept[0][2])


def _path(num_layers: int, blocks: Sequence[int], to: int) -> LayerPath:
    path = [EXECUTE] * num_layers
    for block in blocks:
        path[block] = to
    return tuple(path)


def _request(item: Item) -> tuple[str, tuple[str, ...], int]:
    if item.choices is None:
        return item.prompt, (f" {item.answer}",), 0
    return item.prompt, item.choices, int(item.answer)


def _answer_tokens(evaluator: PathEvaluator, request: tuple[str, tuple[str, ...], Any]) -> int:
    context, choices, answer = request
    return len(encode_pair(evaluator.tokenizer, context, choices[answer])[1])
