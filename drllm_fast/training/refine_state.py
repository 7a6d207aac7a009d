"""The state of a refinement, what a step does to it, and how it is measured. See `drllm_fast.training.refine`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from drllm_fast.decoder import decoder_of, unwrap
from drllm_fast.routers import LayerRouters
from drllm_fast.training.advantages import Prices, leave_one_out, normalised, slopes
from drllm_fast.training.bracket import bracket
from drllm_fast.training.descent import Descent
from drllm_fast.training.draws import Draws, budget_costs, draw, gumbel, log_probabilities
from drllm_fast.training.path_values import PathValues
from drllm_fast.training.refine_config import RefineConfig
from drllm_fast.training.refine_report import Measurement

FIRST_PROMPTS = 64  # on which the penalties of the first step are found


class Refinement(Descent):
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
    def take_step(self) -> dict[str, Tensor]:
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

    def _plans(self, numbers: Sequence[int], noise: Tensor | None = None) -> Callable[[Tensor], Tensor]:
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
