"""How well routers choose what their labels say: precision, recall and F1 by class, visits, calibration.

    precision = tp / (tp + fp)    recall = tp / (tp + fn)    F1 = 2 tp / (2 tp + fp + fn)
    ECE_c     = sum over bins b of  n_b / n |mean q_c in b - share of class c in b|,   bins of equal width in q_c

The calibration error of each class by itself, and its mean: Nixon et al. 2019 (arXiv 1904.01685), static calibration
error; after Guo et al. 2017 (arXiv 1706.04599).

A figure of nothing is None, not 0: the precision of a class that is never chosen, the recall of one without labels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from drllm_fast.router_reference import CLASSES, decide
from drllm_fast.training.loss import NAMES

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Decisions whose probability of a class is in one bin: how many, the mean probability, the class's true share."""

    count: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class ClassFigures:
    """Of one class. labels, chosen: how many. ece: its calibration error. bins: the reliability curve, without the
    bins that hold nothing."""

    labels: int
    chosen: int
    precision: float | None
    recall: float | None
    f1: float | None
    ece: float
    bins: list[Bin]


@dataclass(frozen=True)
class Metrics:
    """classes      of skip, execute and repeat
    accuracy     share of the decisions that are the label
    macro_f1     mean over the classes that have one
    ece          mean over the classes
    visits       of blocks a prompt by the routers' decisions, mean over prompts
    label_visits the same by the labels; of probabilities, the expectation
    """

    classes: dict[str, ClassFigures]
    accuracy: float
    macro_f1: float
    ece: float
    visits: float
    label_visits: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(logits: Tensor, targets: Tensor) -> Metrics:
    """Figures of the routers' decisions for N prompts, at least one.

    logits   floating [L, N, 3]
    targets  classes [N, L], or probabilities [N, L, 3], of which the most probable class counts as the label (execute
             in a tie, as a decision would be) and the probability itself for calibration
    """
    logits = logits.detach().double().transpose(0, 1).cpu()  # [N, L, 3]
    targets = targets.detach().cpu()
    soft = targets.is_floating_point()
    shares = targets.double() if soft else torch.nn.functional.one_hot(targets.long(), CLASSES).double()
    if not len(targets) or logits.shape != shares.shape:
        raise ValueError(
            f"logits must be [L, N, {CLASSES}] and targets [N, L] or [N, L, {CLASSES}] with N of at least 1, got "
            f"{list(logits.permute(1, 0, 2).shape)} and {list(targets.shape)}"
        )
    labels = decide(targets) if soft else targets
    chosen, probabilities = decide(logits), logits.softmax(-1)
    classes = {
        name: _figures(labels == c, chosen == c, probabilities[..., c], shares[..., c]) for c, name in NAMES.items()
    }
    scores = [figures.f1 for figures in classes.values() if figures.f1 is not None]
    return Metrics(
        classes=classes,
        accuracy=(labels == chosen).double().mean().item(),
        macro_f1=sum(scores) / len(scores),
        ece=sum(figures.ece for figures in classes.values()) / CLASSES,
        visits=chosen.double().sum(1).mean().item(),
        label_visits=(shares @ torch.arange(CLASSES, dtype=torch.float64)).sum(1).mean().item(),
    )


def _figures(label: Tensor, chosen: Tensor, probability: Tensor, share: Tensor) -> ClassFigures:
    labels, choices, hits = (int(mask.sum()) for mask in (label, chosen, label & chosen))
    ece, bins = reliability(probability, share)
    return ClassFigures(
        labels=labels,
        chosen=choices,
        precision=hits / choices if choices else None,
        recall=hits / labels if labels else None,
        f1=2 * hits / (labels + choices) if labels + choices else None,
        ece=ece,
        bins=bins,
    )


def reliability(probability: Tensor, share: Tensor, bins: int = BINS) -> tuple[float, list[Bin]]:
    """Expected calibration error, and the bins that are not empty, lowest first.

    probability  fp64 [...] in [0, 1], of the class; bin b takes those from b / bins on, the last one 1 as well
    share        fp64 [...]: 1 where the label is the class, else 0; or its probability
    """
    number = (probability.flatten() * bins).long().clamp(max=bins - 1)
    count, predicted, observed = (
        torch.bincount(number, weights=values, minlength=bins).tolist()
        for values in (None, probability.flatten(), share.flatten())
    )
    total = sum(count)
    ece = sum(abs(p - o) for p, o in zip(predicted, observed, strict=True)) / total
    return ece, [Bin(int(n), p / n, o / n) for n, p, o in zip(count, predicted, observed, strict=True) if n]
