"""Training all routers of a model together, on windows that were stored once.

The L routers are one batched perceptron: a step is three batched matrix products over [L, B * windows, d], and no
Python runs for a layer. It goes through `drllm_fast.router_reference.router_windows` under autograd, which keeps the
hidden units for the backward pass; the op `router_windows` would compute them twice.

The weights of a fit are its own until it is done, so that what interrupts it leaves the routers as they were.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from drllm_fast.router_reference import router_windows
from drllm_fast.routers import LayerRouters
from drllm_fast.training import fit_checkpoint
from drllm_fast.training.fit_inputs import check_inputs, data_hash, split, weights_hash
from drllm_fast.training.fit_report import Epoch, FitReport
from drllm_fast.training.groups import OVERSAMPLED, cvar, draw, worst
from drllm_fast.training.loss import adjust, class_counts, effective_number_weights, focal_loss
from drllm_fast.training.metrics import measure
from drllm_fast.training.trackers import Tracker
from drllm_fast.training.windows import WindowSet

Objective = Callable[[Tensor, Tensor], Tensor]

VALIDATION_BATCH = 64
CHOICES = {"schedule": ("cosine", "constant"), "balance": ("effective", "none"), "robust": ("none", "cvar")}


@dataclass(frozen=True)
class FitConfig:
    """What decides a fit, beside its data and the routers' first weights. The defaults are as published, but for beta.

    epochs, batch_size  prompts a step
    learning_rate, weight_decay   of AdamW
    warmup_steps        the rate rises linearly; at most a quarter of all steps, so that short fits learn, too
    schedule            after that: "cosine", down to 0, or "constant"
    gamma               of the focal loss; 0: cross-entropy
    balance, beta       "effective": class weights, see `loss.effective_number_weights`; "none": all 1. beta None is
                        1 - 1 / labels; 0.999, as published, hardly weighs
    logit_adjustment    tau of `loss.adjust`, over all layers together; 0: none
    robust, cvar        "cvar" draws prompts of the worst groups more often, see `drllm_fast.training.groups`; the share
                        of groups that are the worst, for the reported figure as well
    validation          share of the prompts that is held out
    seed                of the split and of the order of prompts, from 0

    Raises ValueError for what is out of range.
    """

    epochs: int = 25
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 500
    schedule: str = "cosine"
    gamma: float = 2.0
    beta: float | None = None
    balance: str = "effective"
    logit_adjustment: float = 0.0
    robust: str = "none"
    cvar: float = 0.3
    validation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"epochs": 1, "batch_size": 1, "warmup_steps": 0, "seed": 0}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer from {least} on, got {value!r}")
        for name, fine, allowed in (
            ("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number from 0 on"),
            ("gamma", 0 <= self.gamma < math.inf, "a number from 0 on"),
            ("beta", self.beta is None or 0 <= self.beta < 1, "None, or from 0 to below 1"),
            ("logit_adjustment", 0 <= self.logit_adjustment < math.inf, "a number from 0 on"),
            ("cvar", 0 < self.cvar <= 1, "above 0 and at most 1"),
            ("validation", 0 <= self.validation < 1, "from 0 to below 1"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0, of `steps`."""
        warmup = self.warmup(steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    def warmup(self, steps: int) -> int:
        return min(self.warmup_steps, steps // 4)


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
            report.epochs, tensors = stored
            state.load(tensors)
    batches = _Batches(
        windows, targets, groups, training, held, objective or _default_objective(config, counts, weights)
    )
    with tqdm(total=steps, initial=len(report.epochs) * steps // config.epochs, disable=not progress, unit="step") as bar:
        for number in range(len(report.epochs) + 1, config.epochs + 1):
            epoch = _epoch(number, state, batches, config, report, bar)
            report.epochs.append(epoch)
            if folder is not None:
                fit_checkpoint.write(folder, identity, report.epochs, state.tensors())
            if tracker is not None:
                tracker.log(epoch.scalars(), number)
    with torch.no_grad():
        for parameter, weight in zip(routers.parameters(), state.weights, strict=True):
            parameter.copy_(weight)
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


class _State:
    """Weights and optimiser of a fit, and how far it is."""

    def __init__(self, routers: LayerRouters, config: FitConfig, steps: int):
        self.names = [name for name, _ in routers.named_parameters()]
        self.weights = [parameter.detach().clone().requires_grad_() for parameter in routers.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.step, self.steps, self.config = 0, steps, config

    def descend(self, loss: Tensor) -> None:
        self.rate = self.config.rate(self.step, self.steps)
        self.optimizer.param_groups[0]["lr"] = self.rate
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"fit.step": torch.tensor(self.step)}
        for name, weight in zip(self.names, self.weights, strict=True):
            tensors[name] = weight
            tensors |= {f"{name}.{key}": value for key, value in self.optimizer.state[weight].items()}
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.step = int(tensors["fit.step"])
        for name, weight in zip(self.names, self.weights, strict=True):
            weight.data.copy_(tensors[name])
            prefix = f"{name}."
            self.optimizer.state[weight] = {
                key.removeprefix(prefix): value.to(weight.device)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }


class _Batches:
    """Losses of prompts by their number."""

    def __init__(
        self,
        windows: WindowSet,
        targets: Tensor,
        groups: Sequence[str] | None,
        training: np.ndarray,
        held: np.ndarray,
        objective: Objective,
    ):
        self.windows, self.targets, self.objective = windows, targets, objective
        self.training, self.held = training, held
        names, self.group = np.unique(np.array(groups or ["all"] * len(targets)), return_inverse=True)
        self.names = names.tolist()

    def logits(self, rows: np.ndarray, weights: Sequence[Tensor]) -> Tensor:
        index = torch.from_numpy(rows)
        device = weights[0].device
        pooled = self.windows.pooled.index_select(1, index.to(self.windows.pooled.device))
        counts = self.windows.counts[index.to(self.windows.counts.device)]
        return router_windows(pooled.to(device, torch.float32), counts.to(device), *weights)

    def losses(self, logits: Tensor, rows: np.ndarray) -> Tensor:
        targets = self.targets[torch.from_numpy(rows).to(self.targets.device)].to(logits.device)
        losses = self.objective(logits, targets)
        if losses.shape != (len(rows),):
            raise ValueError(f"the objective must return losses [{len(rows)}], got {list(losses.shape)}")
        return losses

    def over(self, rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _epoch(
    number: int, state: _State, batches: _Batches, config: FitConfig, report: FitReport, bar: Any
) -> Epoch:
    started = time.perf_counter()
    last = report.epochs[-1].group_losses if report.epochs else None
    rng = np.random.default_rng([config.seed, number])
    rows = batches.training[draw(rng, _probabilities(batches, config, last))]
    parts = []
    for batch in batches.over(rows, config.batch_size):
        losses = batches.losses(batches.logits(batch, state.weights), batch)
        state.descend(losses.mean())
        parts.append(losses.detach())
        bar.update()
    losses = torch.cat(parts).double().cpu().numpy()
    if not np.isfinite(losses).all():
        raise FloatingPointError(
            f"the loss is not finite in epoch {number}; lower learning_rate ({config.learning_rate}), or look for "
            "windows that are far larger than the rest. The routers are as they were"
        )
    by_group = _group_means(batches, rows, losses, last)
    sizes = np.bincount(batches.group[batches.training], minlength=len(batches.names))
    present = [g for g, name in enumerate(batches.names) if name in by_group]
    values = np.array([by_group[batches.names[g]] for g in present])
    validation, validation_cvar, metrics = _validate(state, batches, config, report.class_counts is not None)
    epoch = Epoch(
        number=number,
        learning_rate=state.rate,
        train_loss=float(np.average(values, weights=sizes[present])),
        train_cvar=cvar(values, config.cvar),
        validation_loss=validation,
        validation_cvar=validation_cvar,
        metrics=metrics,
        group_losses=by_group,
        seconds=time.perf_counter() - started,
    )
    bar.set_postfix(loss=f"{epoch.train_loss:.4f}", epoch=number)
    return epoch


def _probabilities(batches: _Batches, config: FitConfig, last: dict[str, float] | None) -> np.ndarray:
    """How likely each training prompt is to be drawn, given the groups' losses in the last epoch."""
    count = len(batches.training)
    uniform = np.full(count, 1 / count)
    if config.robust == "none" or last is None:
        return uniform
    group = batches.group[batches.training]
    sizes = np.bincount(group, minlength=len(batches.names))
    present = [g for g, name in enumerate(batches.names) if name in last]
    share = np.zeros(len(batches.names))
    share[present] = worst(np.array([last[batches.names[g]] for g in present]), config.cvar)
    return (1 - OVERSAMPLED) * uniform + OVERSAMPLED * (share / np.maximum(sizes, 1))[group]


def _group_means(
    batches: _Batches, rows: np.ndarray, losses: np.ndarray, last: dict[str, float] | None
) -> dict[str, float]:
    """Mean loss of each group among `rows`; of one that was not drawn, what it was in the last epoch."""
    group = batches.group[rows]
    totals, drawn = (np.bincount(group, weights=w, minlength=len(batches.names)) for w in (losses, None))
    means = dict(last or {})
    means.update({name: float(totals[g] / drawn[g]) for g, name in enumerate(batches.names) if drawn[g]})
    return means


@torch.no_grad()
def _validate(
    state: _State, batches: _Batches, config: FitConfig, classes: bool
) -> tuple[float | None, float | None, dict[str, Any] | None]:
    if not len(batches.held):
        return None, None, None
    logits, losses = [], []
    for batch in batches.over(batches.held, VALIDATION_BATCH):
        logits.append(batches.logits(batch, state.weights))
        losses.append(batches.losses(logits[-1], batch))
    each = torch.cat(losses).double().cpu().numpy()
    by_group = _group_means(batches, batches.held, each, None)
    metrics = None
    if classes:
        targets = batches.targets[torch.from_numpy(batches.held)]
        metrics = measure(torch.cat(logits, dim=1), targets).to_dict()
    return float(each.mean()), cvar(np.array(list(by_group.values())), config.cvar), metrics
