"""Training all routers of a model together, on windows that were stored once.

The L routers are one batched perceptron: a step is three batched matrix products over [L, B * windows, d], and no
Python runs for a layer. It goes through `drllm_fast.router_reference.router_windows` under autograd, which keeps the
hidden units for the backward pass; the op `router_windows` would compute them twice.

The weights of a fit are its own until it is done, so that what interrupts it leaves the routers as they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from drllm_fast.router_reference import router_windows
from drllm_fast.routers import LayerRouters
from drllm_fast.training import fit_checkpoint
from drllm_fast.training.descent import Descent
from drllm_fast.training.fit_config import FitConfig
from drllm_fast.training.fit_inputs import check_inputs, data_hash, split, weights_hash
from drllm_fast.training.fit_report import Epoch, FitReport
from drllm_fast.training.groups import Part, cvar, draw, oversampled
from drllm_fast.training.loss import adjust, class_counts, effective_number_weights, focal_loss
from drllm_fast.training.metrics import measure
from drllm_fast.training.trackers import Tracker
from drllm_fast.training.windows import WindowSet

Objective = Callable[[Tensor, Tensor], Tensor]

VALIDATION_BATCH = 64


def fit(
    routers: LayerRouters,
    windows: WindowSet,
    targets: Tensor,
    *,
    groups: Sequence[str] | None = None,
    objective: Objective | None = None,
    config: FitConfig | None = None,
    folder: Path | None = None,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> FitReport:
    """Train `routers`, in place, to choose `targets` from `windows`; they stay on their device.

    windows    of N prompts; pooled may lie on disk (memory-mapped) or on another device, rows are read as they are used
    targets    classes, integer [N, L], or probabilities, floating [N, L, 3]; for an objective anything with N in front
    groups     a name for each prompt, such as its task and level
    objective  losses [B] of a batch from logits fp32 [L, B, 3] and its targets [B, ...], differentiable. None: the mean
               over layers of the focal loss, as `config` says. An objective is known to the checkpoint by its name
    folder     for a checkpoint after every epoch. A fit that was interrupted goes on from there when it is started
               again, and ends with the routers that it would have ended with
    tracker    see `drllm_fast.training.trackers`; it is told of epochs as they end, and not closed

    The same routers, data, config and seed give the same routers bit by bit, on one machine with one number of threads;
    random numbers of the caller's are left alone. An interrupt leaves the routers as they were.

    Raises TypeError or ValueError for data that is not finite, does not belong together or lacks a class that is to be
    balanced, and for a folder of another fit; OSError for a folder that cannot be read or written; before anything has
    changed. FloatingPointError if the loss does, later, become infinite or NaN.
    """
    config = FitConfig() if config is None else config
    check_inputs(routers, windows, targets, groups, classes=objective is None)
    if config.robust == "cvar" and groups is None:
        raise ValueError('robust="cvar" needs groups, a name for each prompt, such as its task and level')
    training, held = split(len(targets), config.validation, config.seed)
    counts = weights = None
    if objective is None:
        counts = class_counts(targets[torch.from_numpy(training)])
        weights = class_weights(counts, config)
    steps = config.epochs * -(-len(training) // config.batch_size)
    report = FitReport(
        validation=held.tolist(),
        training=len(training),
        config=asdict(config),
        class_counts=None if counts is None else counts.tolist(),
        class_weights=None if weights is None else weights.tolist(),
        warmup_steps=config.warmup(steps),
        data_hash=data_hash(windows, targets, groups),
    )
    identity = {
        **{f"config.{name}": value for name, value in report.config.items()},
        "data": report.data_hash,
        "first weights": weights_hash(routers),
        "objective": _name(objective),
    }
    state = _State(routers, config, steps)
    if folder is not None:
        folder = Path(folder)
        stored = fit_checkpoint.read(folder, identity)
        fit_checkpoint.prepare(folder)
        if stored is not None:
            epochs, tensors = stored
            report.epochs = [Epoch(**epoch) for epoch in epochs]
            state.load(tensors)
    classes = objective is None
    losses = _Losses(windows, targets, objective or _default_objective(config, counts, weights), classes)
    parts = Part.of(training, groups), Part.of(held, groups)
    with tqdm(
        total=steps, initial=len(report.epochs) * steps // config.epochs, disable=not progress, unit="step"
    ) as bar:
        for number in range(len(report.epochs) + 1, config.epochs + 1):
            report.epochs.append(_epoch(number, state, losses, *parts, report.epochs, bar))
            if folder is not None:
                fit_checkpoint.write(folder, identity, report.epochs, state.tensors())
            if tracker is not None:
                tracker.log(report.epochs[-1].scalars(), number)
    state.give(routers)
    return report


def class_weights(counts: Tensor, config: FitConfig) -> Tensor:
    """fp32 [3] from the labels of each class, as `config` says."""
    return torch.ones(3) if config.balance == "none" else effective_number_weights(counts, config.beta)


def _default_objective(config: FitConfig, counts: Tensor, weights: Tensor) -> Objective:
    def objective(logits: Tensor, targets: Tensor) -> Tensor:
        if config.logit_adjustment:
            logits = adjust(logits, counts, config.logit_adjustment)
        return focal_loss(logits.transpose(0, 1), targets, weights.to(logits.device), config.gamma).mean(1)

    return objective


def _name(objective: Objective | None) -> str | None:
    if objective is None:
        return None
    named = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{named.__module__}.{named.__qualname__}"


class _State(Descent):
    """A descent at the rates of the config's schedule."""

    rate: float  # of the last step

    def __init__(self, routers: LayerRouters, config: FitConfig, steps: int):
        super().__init__(routers, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
        self.steps, self.config = steps, config

    def descend(self, loss: Tensor) -> None:
        self.rate = self.config.rate(self.step, self.steps)
        super().descend(loss, rate=self.rate)


class _Losses:
    """Logits and losses of prompts by their numbers."""

    def __init__(self, windows: WindowSet, targets: Tensor, objective: Objective, classes: bool):
        self.windows, self.targets, self.objective = windows, targets, objective
        self.classes = classes  # whether the targets are classes

    def __call__(self, rows: np.ndarray, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """fp32 [L, B, 3] and [B], on the device of the weights."""
        device = weights[0].device
        pooled, counts, targets = (
            tensor.index_select(dim, torch.from_numpy(rows).to(tensor.device)).to(device)
            for tensor, dim in ((self.windows.pooled, 1), (self.windows.counts, 0), (self.targets, 0))
        )
        logits = router_windows(pooled, counts, *weights)
        losses = self.objective(logits, targets)
        if losses.shape != (len(rows),):
            raise ValueError(f"the objective must return losses [{len(rows)}], got {list(losses.shape)}")
        return logits, losses


def _epoch(
    number: int, state: _State, losses: _Losses, training: Part, held: Part, before: list[Epoch], bar: Any
) -> Epoch:
    started = time.perf_counter()
    config = state.config
    last = np.array([before[-1].group_losses[name] for name in training.names]) if before else None
    robust = config.robust == "cvar" and last is not None
    rng = np.random.default_rng([config.seed, number])
    drawn = draw(rng, oversampled(training, last, config.cvar) if robust else training.uniform())
    parts = []
    for places in np.split(drawn, range(config.batch_size, len(drawn), config.batch_size)):
        _, batch = losses(training.rows[places], state.weights)
        state.descend(batch.mean())
        parts.append(batch.detach())
        bar.update()
    each = torch.cat(parts).double().cpu().numpy()
    if not np.isfinite(each).all():
        raise FloatingPointError(
            f"the loss is not finite in epoch {number}; lower learning_rate ({config.learning_rate}), or look for "
            "windows that are far larger than the rest. The routers are as they were"
        )
    by_group = training.means(drawn, each, last)
    epoch = Epoch(
        number=number,
        learning_rate=state.rate,
        train_loss=float(np.average(by_group, weights=training.sizes)),
        train_cvar=cvar(by_group, config.cvar),
        **_validate(state, losses, held),
        group_losses=dict(zip(training.names, by_group.tolist(), strict=True)),
        seconds=time.perf_counter() - started,
    )
    bar.set_postfix(epoch=number, loss=f"{epoch.train_loss:.4f}")
    return epoch


@torch.no_grad()
def _validate(state: _State, losses: _Losses, held: Part) -> dict[str, Any]:
    """The figures of an epoch that are of the prompts held out."""
    if not len(held.rows):
        return {"validation_loss": None, "validation_cvar": None, "metrics": None}
    batches = np.split(held.rows, range(VALIDATION_BATCH, len(held.rows), VALIDATION_BATCH))
    logits, each = zip(*(losses(batch, state.weights) for batch in batches), strict=True)
    values = torch.cat(each).double().cpu().numpy()
    metrics = None
    if losses.classes:
        metrics = measure(torch.cat(logits, dim=1), losses.targets[torch.from_numpy(held.rows)]).to_dict()
    return {
        "validation_loss": float(values.mean()),
        "validation_cvar": cvar(held.means(np.arange(len(values)), values), state.config.cvar),
        "metrics": metrics,
    }
