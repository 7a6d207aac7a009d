"""Policy gradient on routers, so that they learn what labels of single prompts cannot tell them: to go together.

For each prompt of a step, paths are drawn block by block from the routers' own probabilities at one of the budgets, and
the frozen model says what each path is worth. The routers' gradient needs neither a backward pass of the model nor a
second forward: what the routers saw along the draws is stored, and log p of all draws is one batched pass over it.

    loss = - mean of A log p(path) + anchor KL(routers || routers as they were)        A: see `advantages`

Each budget b has a penalty, which is moved by dual_rate (share - b) after each step, share being that of the draws: the
draws keep to the budgets, and the gradient goes along them.

What decides is something else: the routers' decisions, without chance, for prompts held out, at the budgets.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from drllm_fast.decoder import decoder_of, unwrap
from drllm_fast.paths import prompt_batches
from drllm_fast.routers import PURE_ROUTER, LayerRouters
from drllm_fast.search.unit import Item, prompt_hash
from drllm_fast.training import fit_checkpoint
from drllm_fast.training.advantages import Prices, leave_one_out, normalised, slopes
from drllm_fast.training.bracket import bracket
from drllm_fast.training.descent import Descent
from drllm_fast.training.draws import Draws, budget_costs, draw, gumbel, log_probabilities
from drllm_fast.training.fit_inputs import split, weights_hash
from drllm_fast.training.path_values import PathValues
from drllm_fast.training.refine_config import RefineConfig
from drllm_fast.training.refine_report import Measurement, RefineReport
from drllm_fast.training.trackers import Tracker

FIRST_PROMPTS = 64  # on which the penalties of the first step are found


def refine(
    model: nn.Module,
    tokenizer: Any,
    routers: LayerRouters,
    items: Sequence[Item],
    *,
    units: Sequence[str] | None = None,
    config: RefineConfig | None = None,
    folder: Path | None = None,
    tracker: Tracker | None = None,
    max_tokens: int = 8192,
    progress: bool = True,
) -> RefineReport:
    """Refine trained routers, in place, on the paths that they choose for the items' prompts.

    model       the routers' own, from transformers, routed or not; it is left as it was
    items       prompts, and what the reward of the config needs
    units       what each prompt is of, such as its document: prompts of one unit are held out together. None: itself
    folder      for a checkpoint after every measurement. A refinement that was interrupted goes on from there when it
                is started again, and ends with the routers that it would have ended with
    tracker     see `drllm_fast.training.trackers`; it is told of measurements as they are made, and not closed
    max_tokens  of a forward
    progress    show a bar

    The routers become the best ones that were measured on the prompts held out; they stay as they are where none was
    better than they, which the report's `kept` says. If they change, their table of budgets, which was that of other
    weights, is removed: calibrate them. Margin and guard hold for draws and measurements alike.

    The same routers, items, config and seed give the same routers bit by bit, on one machine with one number of
    threads. An interrupt leaves the routers as they were.

    Raises TypeError or ValueError for routers of another model or with a knob, for items that are too few, too long, or
    without what the reward needs, and for a folder of something else; OSError for one that cannot be read or written;
    before anything has changed. FloatingPointError if a value or the routers' logits are, later, infinite or NaN.
    """
    config = RefineConfig() if config is None else config
    if not all(isinstance(item, Item) for item in items):
        raise TypeError("items must be those of drllm_fast.search.load_task, or drllm_fast.search.Item")
    if len(items) < 2:
        raise ValueError(f"{len(items)} prompts are too few; give at least 2, and as many as validation needs")
    if routers.knob != PURE_ROUTER:
        raise ValueError(f"routers are refined without the knob, and it is at {routers.knob}; set knob = -0.5 first")
    if any(parameter.dtype != torch.float32 for parameter in routers.parameters()):
        raise TypeError("routers are trained in float32; convert them with routers.float()")
    routers.bind(unwrap(model))
    training, held = _split(range(len(items)) if units is None else units, len(items), config)
    if len(training) < len(config.budgets):
        raise ValueError(
            f"{len(training)} prompts to train on are too few for {len(config.budgets)} budgets; give at least as many"
        )
    values = PathValues(model, tokenizer, items, config.reward, max_tokens=max_tokens)
    prompt_batches(values.tokens, max_tokens)
    settings = asdict(config) | {"budgets": list(config.budgets)}
    report = RefineReport(settings, len(training), held.tolist())
    identity = {
        **{f"config.{name}": value for name, value in settings.items()},
        "prompts": prompts_hash(items),
        "held out": held.tolist(),
        "first weights": weights_hash(routers),
        "margin": routers.margin,
        "guard": routers.guard is not None,
    }
    state = _Refinement(model, routers, values, training, held, config, max_tokens)
    if folder is not None:
        folder = Path(folder)
        stored = fit_checkpoint.read(folder, identity)
        fit_checkpoint.prepare(folder)
        if stored is not None:
            report.measurements = [Measurement(**measurement) for measurement in stored[0]]
            state.load(stored[1])

    def measure(begun: float, steps: list[dict[str, Any]]) -> None:
        report.measurements.append(state.measure(begun, steps))
        if report.kept == len(report.measurements) - 1:
            state.keep()
        if folder is not None:
            fit_checkpoint.write(folder, identity, report.measurements, state.tensors())
        if tracker is not None:
            tracker.log(report.measurements[-1].scalars(list(config.budgets)), state.step)

    with tqdm(total=config.steps, initial=state.step, desc="refining", unit="step", disable=not progress) as bar:
        if not report.measurements:
            begun = time.perf_counter()
            state.start()
            measure(begun, [])
        while state.step < config.steps:
            begun, steps = time.perf_counter(), []
            for _ in range(min(config.every, config.steps - state.step)):
                steps.append(state.take_step())
                bar.update()
            measure(begun, steps)
            bar.set_postfix({f"held-out {config.reward}": f"{report.measurements[-1].value:.4f}"})
    if report.kept:
        state.give_best(routers)
        routers.calibration = None
    return report


def _split(units: Sequence[Any], prompts: int, config: RefineConfig) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the prompts to train on and of those held out, ascending."""
    if len(units) != prompts:
        raise ValueError(f"{prompts} prompts and {len(units)} units; give one unit for each prompt")
    number = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    of = np.array([number[unit] for unit in units])
    training, held = split(len(number), config.validation, config.seed)
    return np.flatnonzero(np.isin(of, training)), np.flatnonzero(np.isin(of, held))


def prompts_hash(items: Sequence[Item]) -> str:
    """16 hex digits of what the refinement depends on in its items, and of their order."""
    return hashlib.sha256("".join(map(prompt_hash, items)).encode()).hexdigest()[:16]


class _Refinement(Descent):
    """The state of a refinement: weights, optimiser, penalties and prices, and the best weights so far."""

    def __init__(
        self,
        model: nn.Module,
        routers: LayerRouters,
        values: PathValues,
        training: np.ndarray,
        held: np.ndarray,
        config: RefineConfig,
        max_tokens: int,
    ):
        device = decoder_of(unwrap(model)).get_input_embeddings().weight.device
        super().__init__(routers, learning_rate=config.learning_rate, weight_decay=0.0, device=device)
        self.model, self.values, self.training, self.held = model, values, training, held
        self.config, self.max_tokens = config, max_tokens
        self.windows, self.margin, self.guard = routers.windows, routers.margin, routers.guard
        self.first = [weight.detach().clone() for weight in self.weights]
        self.best = [weight.detach().clone() for weight in self.weights]
        self.budgets = torch.tensor(config.budgets, dtype=torch.float64, device="cpu")
        self.penalties = torch.zeros_like(self.budgets)  # of the draws
        self.decisions = torch.zeros_like(self.budgets)  # of the routers' decisions, where the last measurement ended
        self.prices = Prices(len(self.budgets))

    # -- a step
    def take_step(self) -> dict[str, Any]:
        """Its figures."""
        config, samples = self.config, self.config.samples
        rng = np.random.default_rng([config.seed, 1, self.step])
        numbers = self._batch()
        budgets = torch.from_numpy(rng.permutation(np.arange(len(numbers)) % len(self.budgets)))
        noise = config.temperature * gumbel(rng, len(numbers) * samples, len(self.weights[0]))
        costs = budget_costs(self.penalties[budgets.repeat_interleave(samples)], self.margin)
        drawn = self._draw(np.repeat(numbers, samples), costs, noise, keep=True)
        paths = drawn.paths.unflatten(0, (len(numbers), samples))
        values, shares = self.values(numbers.tolist(), paths), paths.double().mean(-1)

        costs = costs.to(drawn.windows.pooled.device)
        log_p = log_probabilities(drawn.windows, self.weights, costs, config.temperature)  # [B S, L, 3]
        slope = slopes(log_p, drawn.paths, config.temperature).view_as(shares)
        self.prices.tell(values, shares, slope, budgets)
        price = self.prices.of_a_share()
        rewards = values - price[budgets].unsqueeze(1) * shares
        advantages = normalised(leave_one_out(rewards), budgets, len(self.budgets))

        taken = path_log_probability(log_p, drawn.paths)
        with torch.no_grad():
            reference = log_probabilities(drawn.windows, self.first, costs, config.temperature)
        anchor = (log_p.exp() * (log_p - reference)).sum((1, 2)).mean()
        loss = config.anchor * anchor - (advantages.flatten().float().to(taken.device) * taken).mean()
        norm = self.descend(loss, clip=config.clip)

        by_budget = _means(torch.stack([values.mean(1), shares.mean(1)], 1), budgets, len(self.budgets))
        used = self.penalties
        self.penalties = used + config.dual_rate * (by_budget[:, 1] - self.budgets)
        return {
            "value": by_budget[:, 0],
            "share": by_budget[:, 1],
            "price": price,
            "penalty": used,
            "norm": torch.tensor(norm),
            "anchor": anchor.detach().cpu(),
        }

    def _batch(self) -> np.ndarray:
        """Numbers of the prompts of a step: all prompts in turn, each time in another order."""
        size = min(self.config.batch_size, len(self.training))
        places = np.arange(self.step * size, (self.step + 1) * size)
        rounds, places = np.divmod(places, len(self.training))
        orders = {r: np.random.default_rng([self.config.seed, 0, r]).permutation(self.training) for r in set(rounds)}
        return np.array([orders[r][place] for r, place in zip(rounds, places, strict=True)])

    def _draw(self, numbers: Sequence[int], costs: Tensor, noise: Tensor | None, *, keep: bool) -> Draws:
        prompts = [self.values.tokens[number] for number in numbers]
        return draw(
            self.model, prompts, self.weights, costs, windows=self.windows, noise=noise, guard=self.guard, keep=keep,
            max_tokens=self.max_tokens,
        )  # fmt: skip

    # -- budgets
    def start(self) -> None:
        """The penalties at which the first draws keep to the budgets."""
        rng = np.random.default_rng([self.config.seed, 2])
        numbers = rng.permutation(self.training)[:FIRST_PROMPTS]
        noise = gumbel(rng, len(numbers), len(self.weights[0])).repeat(len(self.budgets), 1, 1)
        found = bracket(self._plans(numbers, self.config.temperature * noise), self.budgets, self.penalties)
        self.penalties = found.at_budget(found.penalties)

    def _plans(self, numbers: Sequence[int], noise: Tensor | None = None) -> Any:
        """For `bracket`: the paths [K, N, L] of these prompts at penalties [K]."""

        def plans_at(penalties: Tensor) -> Tensor:
            costs = budget_costs(penalties.repeat_interleave(len(numbers)), self.margin)
            drawn = self._draw(np.tile(numbers, len(penalties)), costs, noise, keep=False)
            return drawn.paths.unflatten(0, (len(penalties), len(numbers)))

        return plans_at

    def measure(self, begun: float, steps: list[dict[str, Tensor]]) -> Measurement:
        """The routers' decisions for the prompts held out. steps: the figures since the measurement before."""
        found = bracket(self._plans(self.held), self.budgets, self.decisions)
        self.decisions = found.at_budget(found.penalties)
        both = found.plans.flatten(0, 1).transpose(0, 1)  # [N, 2 K, L]
        values = self.values(self.held.tolist(), both).mean(0).view(-1, 2)
        training = {name: torch.stack([step[name] for step in steps]).mean(0).tolist() for name in (steps or [{}])[0]}
        return Measurement(
            step=self.step,
            values=found.at_budget(values).tolist(),
            shares=found.at_budget(found.shares).tolist(),
            penalties=found.penalties.tolist(),
            training=training,
            seconds=time.perf_counter() - begun,
        )

    # -- what is kept
    def keep(self) -> None:
        self.best = [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def give_best(self, routers: LayerRouters) -> None:
        for parameter, weight in zip(routers.parameters(), self.best, strict=True):
            parameter.copy_(weight)

    def tensors(self) -> dict[str, Tensor]:
        own = {"penalties": self.penalties, "decisions": self.decisions, "prices": self.prices.moments}
        best = {f"best.{name}": weight for name, weight in zip(self.names, self.best, strict=True)}
        return super().tensors() | own | best

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        self.penalties, self.decisions = tensors["penalties"], tensors["decisions"]
        self.prices.moments = tensors["prices"]
        self.best = [tensors[f"best.{name}"].to(self.weights[0].device) for name in self.names]


def path_log_probability(log_p: Tensor, paths: Tensor) -> Tensor:
    """fp32 [R]: log p of paths [R, L] from the log-probabilities [R, L, 3] of their blocks."""
    return log_p.gather(2, paths.long().unsqueeze(2).to(log_p.device)).sum((1, 2))


def _means(figures: Tensor, groups: Tensor, count: int) -> Tensor:
    """fp64 [count, F] of figures [B, F], by group."""
    sums = torch.zeros(count, figures.shape[1], dtype=torch.float64).index_add(0, groups, figures)
    return sums / torch.bincount(groups, minlength=count).unsqueeze(1)
