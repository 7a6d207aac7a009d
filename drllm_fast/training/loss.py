"""What routers are trained to minimise: the published focal loss with balanced classes, and its alternatives.

    focal           sum over c of  p_c w_c (1 - q_c)^gamma (-log q_c),   q = softmax(logits), p the target
    effective       w_c proportional to (1 - beta) / (1 - beta^n_c), with mean 1;   n_c labels of class c
    adjusted        logits + tau log pi,   pi the classes' share of the labels, while training only

Focal loss: Lin et al. 2017 (arXiv 1708.02002). Effective numbers: Cui et al. 2019 (arXiv 1901.05555). Both as in Dr.LLM
(arXiv 2510.12773), with gamma = 2 and beta = 0.999. Logit adjustment: Menon et al. 2021 (arXiv 2007.07314).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drllm_fast.router_reference import CLASSES, EXECUTE, REPEAT, SKIP

PUBLISHED_BETA = 0.999
NAMES = {SKIP: "skip", EXECUTE: "execute", REPEAT: "repeat"}
SUM_TOLERANCE = 5e-3  # of a target's probabilities, which may have been stored in bfloat16


def check_targets(targets: Tensor) -> None:
    """ValueError, naming the first place, for a class outside 0..2 or for what are no probabilities; TypeError for
    complex or bool. Integer targets are classes [...], floating ones probabilities [..., 3]."""
    if targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be classes (integer) or probabilities (floating), got {targets.dtype}")
    if not targets.is_floating_point():
        wrong = (targets < 0) | (targets >= CLASSES)
        expected = "0 (skip), 1 (execute) or 2 (repeat)"
    elif targets.ndim and targets.shape[-1] == CLASSES:
        far = (targets.double().sum(-1) - 1).abs() > SUM_TOLERANCE
        wrong = far | (targets < 0).any(-1) | ~targets.isfinite().all(-1)
        expected = "three probabilities that sum to 1"
    else:
        raise ValueError(f"floating targets must be probabilities [..., {CLASSES}], got {list(targets.shape)}")
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        found = targets[tuple(place)].tolist()
        raise ValueError(f"the target at {place} is {found}; it must be {expected}")


def class_counts(targets: Tensor) -> Tensor:
    """fp64 [3]: how many of the targets are of each class; of probabilities, the expected number."""
    if targets.is_floating_point():
        return targets.double().reshape(-1, CLASSES).sum(0)
    return torch.bincount(targets.reshape(-1).long(), minlength=CLASSES).double()


def natural_beta(counts: Tensor) -> float:
    """1 - 1 / n for n labels in all: the beta that is neither idle nor the same as counting nothing.

    Cui et al. read beta as (N - 1) / N, with N the number of distinct samples that can be told apart. A class of more
    than a few N labels has no weight of its own left: at the published 0.999, N = 1000, and of 112,000 labels all three
    classes are beyond it, or nearly. With N the number of labels the weights follow the classes' shares f_c alone,
    1 / (1 - exp(-f_c)), however large the training set is.
    """
    return 1 - 1 / max(float(counts.sum()), 1.0)


def effective_number_weights(counts: Tensor, beta: float | None = None) -> Tensor:
    """Class weights fp32 [3] with mean 1, larger for rarer classes: (1 - beta) / (1 - beta^n_c), normalised.

    counts  [3], how many labels (or expected labels) each class has
    beta    in [0, 1): 0 weighs all classes alike, near 1 each by 1 / n_c. 0.999 as published; None: `natural_beta`

    Cui et al. 2019, as in Dr.LLM. Raises ValueError for an empty class, for which there is no weight.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if counts.shape != (CLASSES,) or not counts.isfinite().all() or (counts < 0).any():
        raise ValueError(f"counts must be {CLASSES} numbers from 0 on, got {counts.tolist()}")
    empty = [NAMES[c] for c in range(CLASSES) if counts[c] == 0]
    if empty:
        raise ValueError(
            f"no label is {' or '.join(empty)} (skip, execute, repeat: {[round(n, 3) for n in counts.tolist()]}), and "
            'an empty class has no effective number; give balance="none", or more data'
        )
    beta = natural_beta(counts) if beta is None else beta
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be from 0 to below 1, got {beta}; {PUBLISHED_BETA} as published")
    # 1 - beta^n, without cancellation for beta near 1.
    effective = torch.ones_like(counts) if beta == 0 else -torch.expm1(counts * math.log(beta))
    weights = 1 / effective
    return (weights / weights.mean()).float()


def adjust(logits: Tensor, counts: Tensor, tau: float) -> Tensor:
    """Logits plus tau log pi, with pi_c = (n_c + 1) / (n + 3): trained so, argmax of the bare logits decides by
    p(c | prompt) / pi_c^tau, and no class wins for being frequent.

    logits  floating [..., 3]
    counts  [..., 3], broadcast against logits; one more label a class keeps an empty class finite

    Menon et al. 2021, eq. 10. `fit` counts over all layers together: that execute is the rule everywhere says nothing
    of a block and may be taken out. That one block is skipped far more often than others is most of what a router
    learns, and priors of each layer would take out just this.
    """
    counts = counts.to(device=logits.device, dtype=torch.float64) + 1
    prior = counts / counts.sum(-1, keepdim=True)
    return logits + (tau * prior.log()).to(logits.dtype)


def focal_loss(logits: Tensor, targets: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """The focal loss of each element, [...]; nothing is averaged. Cross-entropy where gamma is 0.

    logits   floating [..., 3]
    targets  classes, integer [...], or probabilities, floating [..., 3]
    weights  floating [3], of the classes
    gamma    from 0: how much less an element counts that is well classified

    Finite, with finite gradients, for all finite logits and any gamma. Lin et al. 2017, eq. 5; over soft targets it is
    the expectation under them. Raises TypeError or ValueError.
    """
    soft = targets.is_floating_point()
    if not logits.shape[-1:] == weights.shape == (CLASSES,) or targets.shape != logits.shape[: None if soft else -1]:
        raise ValueError(
            f"logits must be [..., {CLASSES}], weights [{CLASSES}] and targets [...] or [..., {CLASSES}], got "
            f"{list(logits.shape)}, {list(weights.shape)} and {list(targets.shape)}"
        )
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be a number from 0 on, got {gamma}; 2 as published, 0 for cross-entropy")
    check_targets(targets)
    log_q = logits.log_softmax(-1)
    each = -log_q * weights.to(log_q.dtype)
    if gamma:
        # log (1 - q_c) from the other two classes: 1 - q itself may be 0, where the power's gradient can be NaN.
        others = torch.logaddexp(log_q.roll(1, -1), log_q.roll(2, -1))
        each = each * (gamma * others).exp()
    if soft:
        return (each * targets.to(each.dtype)).sum(-1)
    return each.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
