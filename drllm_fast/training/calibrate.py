"""The penalty that keeps each budget, measured on prompts.

    S(penalty)   mean over the prompts of the visits that the routers choose, as a share of the dense model's L

The decisions of a block change what later blocks see, so that S is measured: each time, the model reads all prompts.
What is read off the logits of a measurement is where to look first: which penalty would give which share, were they to
stay as they are. S is a step function, and need not fall everywhere; budgets are therefore met one after the
other, from the lowest, each between a penalty that keeps more and the one of the budget before, so that the penalties
of the table fall.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from drllm_fast.budget import BudgetTable
from drllm_fast.decoder import decoder_of, unwrap
from drllm_fast.guard import Guard, row_means
from drllm_fast.influence import evaluating
from drllm_fast.paths import prompt_batches, route_paths, routed_by
from drllm_fast.policies import PromptBatch
from drllm_fast.routers import PURE_ROUTER, LayerRouters

BUDGETS = tuple(percent / 100 for percent in range(50, 111, 5))
MEASUREMENTS = 16  # for one budget, at most
RESOLUTION = 1e-5  # in logits: where S changes within less, it jumps


def calibrate(
    model: nn.Module,
    routers: LayerRouters,
    prompts: Sequence[Sequence[int]],
    *,
    budgets: Sequence[float] = BUDGETS,
    tolerance: float = 0.005,
    groups: Sequence[str] | None = None,
    max_tokens: int = 8192,
    progress: bool = True,
) -> BudgetTable:
    """The table of the budgets that these routers can keep, with their margin and their guard; they are left as they
    were, and so is the model. Set `routers.calibration` to it to use it.

    model       the routers' own, from transformers, routed or not
    prompts     N lists of token ids, a fair sample of what is to be served: the budget is their mean
    budgets     shares of the dense model's visits, above 0 and below 2, in any order
    tolerance   how far from a budget the measured share may be
    groups      of the prompts, such as their tasks; only for the table's source
    max_tokens  of a forward
    progress    show a bar

    A budget that no penalty keeps is left out of the table: where all prompts change at once, the share jumps over it,
    and what the guard keeps from the routers cannot be skipped. The table's `source` holds `prompts`, N; `tolerance`,
    `margin` and `guarded`, the share of guarded prompts; `kept`, the measured share for each budget of the table, and
    by `groups`; `left_out`; `measurements`, how often the model read all prompts.

    Raises TypeError or ValueError for arguments that make no sense, for routers of another model or with a knob, and
    where none of the budgets can be kept.
    """
    wanted = _checked_budgets(budgets)
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be a share above 0 and below 1, got {tolerance!r}")
    if not len(prompts):
        raise ValueError("there are no prompts to calibrate on; give at least one, better hundreds")
    prompt_batches(prompts, max_tokens)
    if groups is not None and len(groups) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(groups)} groups; give one group for each prompt")
    if routers.knob != PURE_ROUTER:
        raise ValueError(f"budgets are kept without the knob, and it is at {routers.knob}; set knob = -0.5 first")
    routers.bind(unwrap(model))

    search = _Search(model, routers, prompts, wanted, max_tokens)
    met: dict[float, _Measured] = {}
    with tqdm(wanted, desc="calibrating", unit="budget", disable=not progress) as bar:
        for place, budget in enumerate(bar):
            found = search.meet(place, tolerance, before=next(reversed(met.values()), None))
            if abs(found.share - budget) <= tolerance:
                met[budget] = found
    if not met:
        shares = ", ".join(f"{share:.3g}" for share in sorted({point.share for point in search.points}))
        raise ValueError(
            f"none of the budgets {', '.join(f'{b:g}' for b in wanted)} can be kept to {tolerance:g} on these "
            f"{len(prompts)} prompts, {search.guarded:.3g} of which are guarded; the shares found are {shares}. Give "
            "other budgets, more prompts, a larger tolerance, or a guard with a larger radius"
        )
    source = {
        "prompts": len(prompts),
        "tolerance": float(tolerance),
        "margin": routers.margin,
        "guarded": search.guarded,
        "kept": [point.share for point in met.values()],
        "groups": _by_group(groups, list(met.values())),
        "left_out": [budget for budget in wanted if budget not in met],
        "measurements": len(search.points),
    }
    return BudgetTable(tuple(met), tuple(point.penalty for point in met.values()), source)


def fit_guard(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    prototypes: int = 32,
    quantile: float = 0.99,
    seed: int = 0,
    max_tokens: int = 8192,
) -> Guard:
    """A guard that knows prompts like these, lists of token ids; for `LayerRouters.guard`. The model is left as it was.

    prototypes, quantile, seed  as for `Guard.fit`, whose errors are raised
    """
    means = prompt_means(model, prompts, max_tokens=max_tokens)
    return Guard.fit(means, prototypes=prototypes, quantile=quantile, seed=seed)


def prompt_means(model: nn.Module, prompts: Sequence[Sequence[int]], *, max_tokens: int = 8192) -> Tensor:
    """fp32 [N, d] on the CPU: for each prompt, a list of token ids, the mean of what enters block 0. No block is run.

    Raises ValueError for prompts without tokens.
    """
    decoder = decoder_of(unwrap(model))
    device = decoder.get_input_embeddings().weight.device
    means = torch.zeros(len(prompts), decoder.config.hidden_size, dtype=torch.float32, device="cpu")
    reader = _Entering(len(decoder.layers))
    batches = prompt_batches(prompts, max_tokens)
    with routed_by(model, reader), evaluating(decoder), torch.inference_mode():
        for rows, batch in batches:
            decoder(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
            means[rows] = reader.means.cpu()
    return means


class _Entering:
    """Keeps the means of what enters block 0, and runs no block."""

    means: Tensor

    def __init__(self, num_layers: int):
        self.num_layers = num_layers

    def route(self, layer: int, prompts: PromptBatch) -> Tensor:
        self.means = row_means(prompts.hidden, prompts.cu_seqlens)
        return torch.zeros(len(self.means), self.num_layers, dtype=torch.int8, device="cpu")


@dataclass(frozen=True)
class _Measured:
    """penalty, and S(penalty)
    shares  fp64 [N], of each prompt
    next    for each budget the penalty that would keep it if no logit changed
    """

    penalty: float
    share: float
    shares: Tensor | None = None
    next: tuple[float, ...] = ()


class _Listening:
    """The routers, and what they said: logits [B, 3] of each block and forward, those that lead to the decisions."""

    def __init__(self, routers: LayerRouters):
        self.routers = routers
        self.logits: list[Tensor] = []
        self.guarded = 0

    def route(self, layer: int, prompts: PromptBatch) -> Tensor:
        decisions = self.routers.route(layer, prompts)
        logits = self.routers.logits(layer, prompts).detach().cpu()
        guarded = prompts.memory.get("guarded")
        if guarded is not None:
            logits[guarded] = torch.tensor([-math.inf, 0.0, -math.inf], device="cpu")
            self.guarded += int(guarded.sum()) if layer == 0 else 0
        self.logits.append(logits)
        return decisions


class _Search:
    """points   all that was measured, by penalty
    guarded  share of the prompts that no penalty changes, known after the first measurement
    """

    def __init__(
        self,
        model: nn.Module,
        routers: LayerRouters,
        prompts: Sequence[Sequence[int]],
        budgets: Sequence[float],
        max_tokens: int,
    ):
        self.model, self.prompts, self.budgets, self.max_tokens = model, prompts, budgets, max_tokens
        self.routers = copy.copy(routers)  # the same parameters; the penalty is its own
        self.routers.budget = None
        self.points: list[_Measured] = []
        self.guarded = 0.0
        self._measure(0.0)

    def meet(self, place: int, tolerance: float, before: _Measured | None) -> _Measured:
        """What comes nearest to the budget at `place`, at no larger a penalty than `before`."""
        budget = self.budgets[place]

        def miss(point: _Measured) -> float:
            return abs(point.share - budget)

        def allowed() -> list[_Measured]:
            return [point for point in self.points if before is None or point.penalty <= before.penalty]

        def nearest() -> _Measured:
            return min(allowed(), key=miss)

        for attempt in range(MEASUREMENTS):
            if miss(nearest()) <= tolerance or not self.guarded < budget < 2 - self.guarded:
                break
            # All but the guarded prompts repeat every block if visits are paid for well enough, or skip every block.
            ends = [_Measured(-math.inf, 2 - self.guarded), *allowed()]
            if before is None:
                ends.append(_Measured(math.inf, self.guarded))
            last = max(i for i, point in enumerate(ends) if point.share >= budget)
            if last + 1 == len(ends):  # `before` keeps more than this budget
                break
            low, high = ends[last : last + 2]
            if high.penalty - low.penalty < RESOLUTION:
                break
            self._measure(_between(low, high, place, attempt, miss))
        return nearest()

    def _measure(self, penalty: float) -> None:
        self.routers.penalty = penalty
        listening = _Listening(self.routers)
        plans = route_paths(self.model, self.prompts, listening, max_tokens=self.max_tokens)
        shares = plans.double().mean(dim=1)
        self.guarded = listening.guarded / len(self.prompts)
        roots = _roots(torch.cat(listening.logits), self.routers.margin, self.budgets)
        self.points.append(_Measured(penalty, shares.mean().item(), shares, roots))
        self.points.sort(key=lambda point: point.penalty)


def _between(low: _Measured, high: _Measured, place: int, attempt: int, miss: Callable[[_Measured], float]) -> float:
    """Where to measure next: on the straight line between two measurements, every third time in the middle (the line
    alone can creep); beyond the last one, where its logits say, else ever further out."""
    if math.isfinite(low.penalty) and math.isfinite(high.penalty):
        part = 0.5 if attempt % 3 == 2 else miss(low) / (miss(low) + miss(high))
        return low.penalty + part * (high.penalty - low.penalty)
    end, sign = (low, 1) if math.isfinite(low.penalty) else (high, -1)
    if low.penalty < end.next[place] < high.penalty and attempt % 3 != 2:
        return end.next[place]
    return end.penalty + sign * max(1.0, abs(end.penalty))


def _roots(logits: Tensor, margin: float, budgets: Sequence[float]) -> tuple[float, ...]:
    """For each budget the penalty at which decisions from these logits [M, 3] would be so many visits in the mean.

    With a rising penalty each decision goes from repeat to execute at r = z2 - margin - z1, from execute to skip at
    s = z1 + margin - z0; if r > s, from repeat to skip at (r + s) / 2. The visits left are those steps that are above
    the penalty: the answer is a quantile of all steps. It lies between two that are apart, so that rounding decides
    nothing; where none are, or only guarded prompts are left, it is not finite.
    """
    skip, execute, repeat = logits.double().unbind(1)
    first, second = repeat - margin - execute, execute + margin - skip
    both = torch.where(first > second, (first + second) / 2, torch.nan)
    steps = torch.cat([torch.where(both.isnan(), step, both) for step in (first, second)]).sort(descending=True).values
    left = 1 + (steps[:-1] - steps[1:] > RESOLUTION).nonzero().flatten()  # visits between such steps
    if not len(left):
        return (math.nan,) * len(budgets)
    nearest = [int(left[(left - budget * len(logits)).abs().argmin()]) for budget in budgets]
    return tuple(((steps[place - 1] + steps[place]) / 2).item() for place in nearest)


def _checked_budgets(budgets: Sequence[float]) -> list[float]:
    """Rising, each once."""
    if isinstance(budgets, Real | str) or not len(budgets):
        raise ValueError(f"budgets must be one or more shares such as (0.8, 0.9, 1.0), got {budgets!r}")
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, Real):
            raise TypeError(f"a budget must be a number, the share of the dense model's visits, got {budget!r}")
        if not 0 < budget < 2:
            raise ValueError(f"a budget must be above 0 (all skipped) and below 2 (all repeated), got {budget}")
    return sorted({float(budget) for budget in budgets})


def _by_group(groups: Sequence[str] | None, points: Sequence[_Measured]) -> dict[str, dict[str, Any]]:
    found = {}
    for name in sorted(set(groups or ())):
        rows = [row for row, group in enumerate(groups) if group == name]
        found[name] = {"prompts": len(rows), "kept": [point.shares[rows].mean().item() for point in points]}
    return found
