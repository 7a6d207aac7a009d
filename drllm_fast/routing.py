"""`model.routing`: what a routed model did, and the context managers that change what it does next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from drllm_fast.attention import PREFIX, register
from drllm_fast.policies import GivenPlan, RoutingPolicy, as_policy, check_length
from drllm_fast.settings import changed
from drllm_fast.stats import RoutingStats
from drllm_fast.tally import Tally


class Routing:
    """The routing of one model: its policy, and what the last prompt batch ran.

    Made by `enable_dynamic_routing`; reach it as `model.routing`.
    """

    def __init__(self, policy: RoutingPolicy, num_layers: int, windows: list[int], attention: str):
        self._policy = policy
        self.num_layers = num_layers
        self.windows = windows  # sliding window of each layer, 0 for full attention
        self.attention = attention  # the attention implementation that the config must name while routing is on
        self.last: Tally | None = None
        self.modules: list[nn.Module] = []  # whose classes are swapped: the layers, the base model, the model

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        register(self.attention.removeprefix(PREFIX))  # in another process it is not there yet

    @property
    def policy(self) -> RoutingPolicy:
        """What chooses paths; set it to anything that `enable_dynamic_routing` takes, for the prompts that follow."""
        return self._policy

    @policy.setter
    def policy(self, policy: object) -> None:
        policy = as_policy(policy)
        if hasattr(policy, "bind"):
            policy.bind(self.modules[-1])
        self._policy = policy

    def __repr__(self) -> str:
        budget = getattr(self.policy, "budget", None)
        return f"Routing({type(self.policy).__name__}, {self.num_layers} layers, budget={budget})"

    # -- what ran
    @property
    def stats(self) -> RoutingStats:
        """Visits, tokens and KV bytes of the last prompt batch (of any thread), its decoding included.

        Raises RuntimeError before the first forward."""
        if self.last is None:
            raise RuntimeError("no prompt has been routed yet; call the model or model.generate first")
        return self.last.stats(self.windows)

    @property
    def plan(self) -> Tensor:
        """int8 [B, L], the paths of the last prompt batch."""
        return self.stats.plan

    @property
    def budget(self) -> float | None:
        """The policy's budget, the mean share of the dense visits; None for a policy without one."""
        return getattr(self.policy, "budget", None)

    @budget.setter
    def budget(self, budget: float) -> None:
        set_budget(self.policy, budget)

    def summary(self, **kwargs) -> str:
        """A table for people: per row its path, the layers it ran and the KV bytes it holds."""
        from drllm_fast.report import summary

        return summary(self.stats, **kwargs)

    def plot(self, path: str | None = None, **kwargs):
        """A heat map of the plan, examples by layers; saved to `path` if given. Returns the matplotlib Figure."""
        from drllm_fast.report import plot_plan

        return plot_plan(self.stats, path, **kwargs)

    # -- what to do next, in this thread
    @contextmanager
    def using(self, plan: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Iterator[None]:
        """Force paths: prompts that are prefilled inside follow `plan` ([L], or [P, L] as in `GivenPlan`).

        Like `disabled` and `context`, for this thread or asyncio task only; a thread that is started inside follows if
        it is run with `contextvars.copy_context().run`. Of `using` and `disabled` the innermost holds."""
        given = GivenPlan(plan)
        check_length(given.plan, self.num_layers)
        with changed(self, plan=given, disabled=False):
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The dense model, as it was before routing was enabled."""
        with changed(self, disabled=True):
            yield

    @contextmanager
    def context(self, lengths: Sequence[int] | Tensor) -> Iterator[None]:
        """Route on the first lengths[b] tokens of row b only (its context), whatever follows them in the same forward.

        Lengths count real tokens. Used to score answer choices: the answer must not choose the network."""
        if isinstance(lengths, int):
            raise TypeError(f"context lengths must be one positive integer for each row, given {lengths}")
        lengths = tuple(int(n) for n in lengths)
        if not lengths or min(lengths) < 1:
            raise ValueError(f"context lengths must be one positive integer for each row, given {lengths}")
        with changed(self, context=lengths):
            yield


def set_budget(policy: RoutingPolicy, budget: float) -> None:
    """Set a policy's budget; TypeError / ValueError if it has none."""
    if not hasattr(policy, "budget"):
        raise ValueError(
            f"{type(policy).__name__} keeps no budget; leave the budget out, or use a policy that has one, such as "
            "drllm_fast.StaticPolicy"
        )
    policy.budget = budget
