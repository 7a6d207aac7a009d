"""What a path is worth: rewards from a path's scores or its answer, and when it counts as correct.

    exact      1 for the right answer, else 0 (the paper's)
    agreement  the same, but a right answer counts as correct only once `config.agree` paths of the search give it: one
               lucky path among many is little evidence
    margin     log-likelihood of the right choice minus the best other one's
    loglik     log-likelihood of the right choice, or of the right answer's tokens where there are no choices
    kl         -KL(dense || path) of the next token's distribution, over the tokens of the choices or of the right
               answer. Correct is the dense path's own answer, so that with choices no label is needed

Multiple choice takes the choice of the largest sum of log-likelihoods; a free answer is graded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from drllm_fast.search.base import Outcome
from drllm_fast.search.unit import Item, SearchConfig

REWARDS = ("exact", "agreement", "margin", "loglik", "kl")


@dataclass(frozen=True)
class Evaluation:
    """What one path made of an item.

    prediction  index of the choice taken as text, or the answer written
    scores      log-likelihoods of the choices, or of the right answer and that of the control; None if no reward asks
                for them
    divergence  KL(dense || path), in nats; None if no reward asks for it
    """

    prediction: str
    scores: tuple[float, ...] | None = None
    divergence: float | None = None


def check_reward(config: SearchConfig, item: Item) -> None:
    """ValueError where the item has nothing that the reward could be computed from."""
    if config.reward not in REWARDS:
        raise ValueError(f"reward must be one of {', '.join(REWARDS)}, got {config.reward!r}")
    if config.reward == "margin" and item.choices is None:
        raise ValueError(
            f"the reward margin compares choices, and {item.task} asks for free answers; use exact, agreement, loglik "
            "or kl"
        )
    if config.reward == "margin" and len(item.choices) < 2:
        raise ValueError(f"the reward margin compares choices, and item {item.id} has only one")
    if config.agree < 1:
        raise ValueError(f"agree must be at least 1, got {config.agree}")


def right_prediction(item: Item, target: str | None, grade: Callable[[str, Item], bool]) -> Callable[[str], bool]:
    """Whether a prediction is the right one; with a `target`, whether it is that one."""
    if item.choices is not None:
        wanted = str(item.answer) if target is None else target
        return lambda prediction: prediction == wanted
    aimed = item if target is None else replace(item, answer=target, aliases=())
    return lambda prediction: grade(prediction, aimed)


def reward(config: SearchConfig, evaluation: Evaluation, right: bool, target: int) -> float:
    """The path's reward; `target`: index into the scores, of what is searched for."""
    if config.reward in ("exact", "agreement"):
        return float(right)
    if config.reward == "kl":
        return -evaluation.divergence
    scores = evaluation.scores
    if config.reward == "loglik":
        return scores[target]
    return scores[target] - max(score for choice, score in enumerate(scores) if choice != target)


class Agreement:
    """Counts the paths that are right: before the `needed`-th none counts as correct."""

    def __init__(self, needed: int):
        self.needed, self.right = needed, 0

    def __call__(self, outcome: Outcome) -> Outcome:
        self.right += outcome.correct
        return Outcome(outcome.reward, outcome.correct and self.right >= self.needed)


def wrong_answer(item: Item, dense_prediction: str, draw: Callable[[Sequence[str]], str]) -> str | None:
    """A wrong answer that the dense path does not give, for the control; None where there is none: two choices, or an
    answer that is no whole number."""
    if item.choices is not None:
        others = [str(c) for c in range(len(item.choices)) if str(c) not in (str(item.answer), dense_prediction)]
        return draw(others) if others else None
    try:
        answer = int(str(item.answer))
    except ValueError:
        return None
    said = dense_prediction.split()[0] if dense_prediction.split() else ""
    near = [str(answer + step) for step in (-10, -2, -1, 1, 2, 10) if str(answer + step) != said]
    return draw(near)
