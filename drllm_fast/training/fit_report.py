"""What a fit reports: the figures of every epoch."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

MAX_ROWS = 12


@dataclass(frozen=True)
class Epoch:
    """number            from 1
    learning_rate     of its last step
    train_loss        mean over the training examples, while they were trained on; with over-sampling, of groups by
                      their size
    train_cvar        mean over the worst groups, see `drllm_fast.training.groups`; without groups the mean
    validation_loss, validation_cvar   after the epoch, on the examples held out; None without any
    metrics           `drllm_fast.training.metrics.Metrics` of the examples held out, as a dict; None without any, and
                      for an objective of the caller's
    group_losses      of each group in training
    seconds           of the epoch, validation included
    """

    number: int
    learning_rate: float
    train_loss: float
    train_cvar: float
    validation_loss: float | None
    validation_cvar: float | None
    metrics: dict[str, Any] | None
    group_losses: dict[str, float]
    seconds: float

    def scalars(self) -> dict[str, float]:
        """The figures that are single numbers, for a tracker; those that are None are left out."""
        values = {
            "train/loss": self.train_loss,
            "train/cvar": self.train_cvar,
            "train/learning_rate": self.learning_rate,
            "validation/loss": self.validation_loss,
            "validation/cvar": self.validation_cvar,
        }
        if self.metrics is not None:
            for name in ("accuracy", "macro_f1", "ece", "visits", "label_visits"):
                values[f"validation/{name}"] = self.metrics[name]
            for name, figures in self.metrics["classes"].items():
                values[f"validation/f1_{name}"] = figures["f1"]
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class FitReport:
    """epochs          one entry for each
    validation      numbers of the examples held out, ascending
    training        how many were trained on
    config          of the fit
    class_counts    labels by class among the training examples, and the weights of the classes; None for an objective
    class_weights   of the caller's
    warmup_steps    that were taken, see `FitConfig`
    data_hash       16 hex digits of windows, targets and groups
    """

    validation: list[int]
    training: int
    config: dict[str, Any]
    class_counts: list[float] | None
    class_weights: list[float] | None
    warmup_steps: int
    data_hash: str
    epochs: list[Epoch] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(epoch.seconds for epoch in self.epochs)

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return asdict(self) | {"seconds": self.seconds}

    def text(self, width: int = 110) -> str:
        """A table of the epochs in plain text, of at most 12 of them, the first and the last included."""
        table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        columns = "epoch|train loss|cvar|val. loss|cvar|F1 skip|execute|repeat|ECE|visits|of labels|s"
        for column in columns.split("|"):
            table.add_column(column, justify="right")
        for epoch in shown(self.epochs):
            metrics = epoch.metrics or {}
            classes = [metrics.get("classes", {}).get(name, {}).get("f1") for name in ("skip", "execute", "repeat")]
            table.add_row(
                str(epoch.number),
                *(_number(loss, 4) for loss in (epoch.train_loss, epoch.train_cvar)),
                *(_number(loss, 4) for loss in (epoch.validation_loss, epoch.validation_cvar)),
                *(_number(f1, 3) for f1 in classes),
                _number(metrics.get("ece"), 3),
                *(_number(metrics.get(name), 2) for name in ("visits", "label_visits")),
                _number(epoch.seconds, 2),
            )
        console = Console(
            file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False
        )
        console.print(table)
        console.print(
            f"{self.training} prompts to train on, {len(self.validation)} held out; F1, ECE and visits of those held "
            f"out. {len(self.epochs)} epochs in {self.seconds:.1f} s."
        )
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")


def shown(epochs: list[Epoch]) -> list[Epoch]:
    """At most `MAX_ROWS` of them, evenly spread."""
    last = len(epochs) - 1
    if last < MAX_ROWS:
        return epochs
    return [epochs[round(row * last / (MAX_ROWS - 1))] for row in range(MAX_ROWS)]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
