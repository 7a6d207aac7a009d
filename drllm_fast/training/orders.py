"""In which order the blocks of a prompt are best left out, and a training set for routers made of it.

For each prompt a nested sequence of blocks b_1, b_2, ... is looked for whose paths (b_1 left out, b_1 and b_2, ...)
cost least, by a beam search over a cost model (`drllm_fast.training.prices`); likewise a sequence of blocks to repeat.
The price of block l is its place in the sequence of the prompt:

    place_skip[l] = i if l = b_i, else K + 1             a budget of k blocks less is a threshold between k and k + 1

Prices in nats would let easy prompts pay for hard ones; places keep the budget for each kind of prompt.

Routers learn places as thresholds. With m = logit_execute - logit_skip and T thresholds t_1 < t_2 < ...,

    loss = mean over t of  BCE(sigmoid((m - t) / tau), [place > t])

(all-threshold ordinal regression, Rennie & Srebro 2005), and the same for repeat. A budget's penalty is a threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from drllm_fast.router_reference import EXECUTE, REPEAT, SKIP
from drllm_fast.training.prices import CostModel


@dataclass
class Orders:
    """skips int64 [N, K] and repeats int64 [N, R]: blocks in the order in which they are left out, or repeated."""

    num_layers: int
    skips: Tensor
    repeats: Tensor

    def places(self) -> Tensor:
        """fp32 [N, L, 2]: the place of each block in the two sequences, from 1; else one more than their length."""
        out = torch.empty(len(self.skips), self.num_layers, 2)
        for column, sequence in enumerate((self.skips, self.repeats)):
            length = sequence.shape[1]
            out[..., column] = length + 1
            ranks = torch.arange(1, length + 1, dtype=torch.float32).expand(len(sequence), -1)
            out[..., column].scatter_(1, sequence, ranks)
        return out

    def paths(self, rows: Tensor, steps: Tensor) -> Tensor:
        """int8 [M, L]: of prompt rows[m] the path after steps[m] blocks left out, or -steps[m] repeated."""
        places = self.places()[rows]
        path = torch.full(places.shape[:2], EXECUTE, dtype=torch.int8)
        path[places[..., 0] <= steps.unsqueeze(1)] = SKIP
        path[places[..., 1] <= -steps.unsqueeze(1)] = REPEAT
        return path


def find_orders(
    cost: CostModel, z: Tensor, *, skippable: Tensor, repeatable: Tensor, skips: int, repeats: int, beam: int = 4,
    chunk: int = 256, progress: bool = True,
) -> Orders:  # fmt: skip
    """Sequences of `skips` and of `repeats` blocks for each prompt of features z [N, f].

    skippable, repeatable  bool [L], the blocks that may be in them: those that enough measured paths have changed
    beam                   sequences kept at each length
    """
    for name, allowed, count in (("skips", skippable, skips), ("repeats", repeatable, repeats)):
        if count > int(allowed.sum()):
            raise ValueError(f"{name}={count}, but measured paths have changed only {int(allowed.sum())} blocks so")
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for some in tqdm(z.split(chunk), desc="ordering blocks", disable=not progress):
        found[0].append(_sequences(cost, some, skippable, SKIP, skips, beam))
        found[1].append(_sequences(cost, some, repeatable, REPEAT, repeats, beam))
    return Orders(len(skippable), torch.cat(found[0]), torch.cat(found[1]))


def shared_order(cost: CostModel, z: Tensor, *, skippable: Tensor, skips: int) -> Tensor:
    """int64 [skips]: the one sequence of blocks to leave out that costs least on the mean of the prompts z [N, f]."""

    def mean(_: Tensor, paths: Tensor) -> Tensor:
        each = cost(z.repeat(len(paths), 1), paths.repeat_interleave(len(z), 0))
        return each.view(len(paths), len(z)).mean(1)

    return _sequences(mean, z[:1], skippable, SKIP, skips, beam=4)[0]


def balanced(groups: Sequence[str], each: int, seed: int = 0) -> Tensor:
    """Numbers of prompts, at most `each` of every group, drawn."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for group in sorted(set(groups)):
        members = torch.tensor([number for number, name in enumerate(groups) if name == group])
        drawn.append(members[torch.randperm(len(members), generator=generator)[:each]])
    return torch.cat(drawn)


def _sequences(
    cost: Callable[[Tensor, Tensor], Tensor], z: Tensor, allowed: Tensor, to: int, length: int, beam: int
) -> Tensor:
    prompts, layers = len(z), len(allowed)
    paths = torch.full((prompts, 1, layers), EXECUTE, dtype=torch.int8)
    sequences = torch.empty(prompts, 1, 0, dtype=torch.int64)
    totals = torch.zeros(prompts, 1)
    blocks = allowed.nonzero().squeeze(1)
    for _ in range(length):
        kept = paths.shape[1]
        longer = paths.unsqueeze(2).repeat(1, 1, len(blocks), 1)  # [prompts, kept, candidates, L]
        longer.scatter_(3, blocks.view(1, 1, -1, 1).expand(prompts, kept, -1, 1), to)
        flat = longer.flatten(0, 2)
        costs = cost(z.repeat_interleave(kept * len(blocks), 0), flat).view(prompts, kept, len(blocks))
        taken = paths[:, :, blocks] != EXECUTE
        total = (totals.unsqueeze(2) + costs).masked_fill(taken, torch.inf)
        # Of sequences of the same blocks one stays: the cheapest on the way.
        keys = longer.double() @ torch.rand(layers, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        total = _cheapest_of_equals(total.flatten(1), keys.flatten(1))
        best, index = total.topk(min(beam, total.shape[1]), dim=1, largest=False)
        parent, block = index // len(blocks), blocks[index % len(blocks)]
        paths = longer.flatten(1, 2).gather(1, index.unsqueeze(2).expand(-1, -1, layers))
        sequences = torch.cat(
            [sequences.gather(1, parent.unsqueeze(2).expand(-1, -1, sequences.shape[2])), block.unsqueeze(2)], dim=2
        )
        totals = best
    return sequences[:, 0]


def _cheapest_of_equals(total: Tensor, keys: Tensor) -> Tensor:
    """Totals, infinite for all but the cheapest of those whose keys are equal in a row."""
    order = total.argsort(dim=1, stable=True)
    by_key = keys.gather(1, order).argsort(dim=1, stable=True)
    order = order.gather(1, by_key)  # by key, then by total
    sorted_keys = keys.gather(1, order)
    again = torch.zeros_like(total, dtype=torch.bool)
    again[:, 1:] = sorted_keys[:, 1:] == sorted_keys[:, :-1]
    out = total.clone()
    return out.scatter_(1, order, total.gather(1, order).masked_fill(again, torch.inf))


def supported(paths: Tensor, to: int, share: float = 0.005) -> Tensor:
    """bool [L]: blocks that at least this share of the measured paths int8 [M, L] skips, or repeats."""
    return (paths == to).float().mean(0) >= share


def spread_steps(
    groups: Sequence[str], *, skips: int, repeats: int, each: int, least: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Prompts, by number, and lengths of path from -repeats to skips to be taught at, int64 [M] both: `each` different
    lengths of every prompt, more where its group would else have fewer than `least`. Routers must know what they see
    on short paths and on long ones."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.arange(-repeats, skips + 1)
    weights = torch.where(lengths < 0, 0.2, 1.0)  # few ask for more than the dense model
    rows, steps = [], []
    for group in sorted(set(groups)):
        members = torch.tensor([number for number, name in enumerate(groups) if name == group])
        passes = max(each, -(-least // len(members)))
        drawn = [
            torch.multinomial(weights.expand(len(members), -1), min(len(lengths), passes), generator=generator)
            for _ in range(-(-passes // len(lengths)))
        ]
        some = torch.cat(drawn, dim=1)[:, :passes]  # [members, passes]
        rows.append(members.repeat_interleave(passes))
        steps.append(lengths[some.flatten()])
    return torch.cat(rows), torch.cat(steps)


class PlaceObjective:
    """The loss of the module's docstring, for `drllm_fast.training.fit.fit`: targets fp32 [B, L, 2] are places."""

    def __init__(self, skips: int, repeats: int, tau: float = 0.5):
        self.thresholds = torch.arange(0, skips + 1) + 0.5, torch.arange(0, repeats + 1) + 0.5
        self.tau = tau

    def __call__(self, logits: Tensor, places: Tensor) -> Tensor:
        skip, execute, repeat = logits.transpose(0, 1).unbind(-1)  # [B, L]
        loss = torch.zeros(len(places), device=logits.device)
        for margin, column, thresholds in zip((execute - skip, execute - repeat), (0, 1), self.thresholds, strict=True):
            thresholds = thresholds.to(logits.device)
            stays = (places[..., column, None] > thresholds).to(logits.dtype)
            scores = (margin.unsqueeze(-1) - thresholds) / self.tau
            loss = loss + F.binary_cross_entropy_with_logits(scores, stays, reduction="none").mean((1, 2))
        return loss
