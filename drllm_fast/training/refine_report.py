"""What a refinement reports: figures of the prompts held out, at each budget, from time to time."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from drllm_fast.training.fit_report import shown


@dataclass(frozen=True)
class Measurement:
    """Of the routers' decisions for the prompts held out; a list has an entry for each budget.

    step      how many steps were taken before
    values    mean value of the paths, at the budget, see `drllm_fast.training.bracket`
    shares    of the dense model's visits, of the same; it is the budget where that can be kept
    penalties [2] between which the budget is kept
    training  means over the steps since the measurement before: of each budget's draws `value` and `share`, its
              `price` and `penalty`; `norm` of the gradient, `anchor`; empty for the first
    seconds   since the measurement before
    """

    step: int
    values: list[float]
    shares: list[float]
    penalties: list[list[float]]
    training: dict[str, Any]
    seconds: float

    @property
    def value(self) -> float:
        """Mean over the budgets: what decides which routers are kept."""
        return sum(self.values) / len(self.values)

    def scalars(self, budgets: list[float]) -> dict[str, float]:
        """For a tracker."""
        figures = {"validation/value": self.value}
        for place, budget in enumerate(budgets):
            figures[f"validation/value_{budget:g}"] = self.values[place]
            figures[f"validation/share_{budget:g}"] = self.shares[place]
            for name, figure in self.training.items():
                if isinstance(figure, list):
                    figures[f"train/{name}_{budget:g}"] = figure[place]
        return figures | {f"train/{name}": f for name, f in self.training.items() if not isinstance(f, list)}


@dataclass
class RefineReport:
    """config        of the refinement
    training      how many prompts it drew paths for
    validation    numbers of the prompts held out, ascending
    measurements  the first is of the routers as they were
    """

    config: dict[str, Any]
    training: int
    validation: list[int]
    measurements: list[Measurement] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Number of the measurement whose routers were kept, the first of the best; 0: the routers are unchanged."""
        return max(range(len(self.measurements)), key=lambda number: self.measurements[number].value)

    @property
    def seconds(self) -> float:
        return sum(measurement.seconds for measurement in self.measurements)

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return asdict(self) | {"kept": self.kept, "seconds": self.seconds}

    def text(self, width: int = 110) -> str:
        """Tables in plain text: the measurements, at most 12 of them, and each budget before and after."""
        reward, budgets = self.config["reward"], self.config["budgets"]
        table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        columns = ["step", f"mean {reward}", *(f"at {b:g}" for b in budgets), *(f"drawn {b:g}" for b in budgets), "s"]
        for column in columns:
            table.add_column(column, justify="right")
        for measurement in shown(self.measurements):
            drawn = measurement.training.get("share", [None] * len(budgets))
            table.add_row(
                str(measurement.step),
                *(f"{value:.4f}" for value in (measurement.value, *measurement.values)),
                *("-" if share is None else f"{share:.3f}" for share in drawn),
                f"{measurement.seconds:.1f}",
            )
        console = Console(
            file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False
        )
        console.print(table)
        console.print("\n".join(self._summary()), highlight=False, markup=False)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")

    def _summary(self) -> list[str]:
        reward, budgets = self.config["reward"], self.config["budgets"]
        before, after = self.measurements[0], self.measurements[self.kept]
        of = f"{len(self.validation)} prompts held out of {self.training + len(self.validation)}"
        lines = [
            f"Mean {reward} of the routers' decisions for {of}; drawn: the share of visits of the draws in training."
        ]
        if not self.kept:
            return [*lines, "The routers are unchanged: no measurement was better than theirs."]
        for place, budget in enumerate(budgets):
            share = after.shares[place]
            missed = "" if abs(share - budget) < 5e-4 else f" (at {share:.3f}: the budget cannot be kept)"
            lines.append(f"budget {budget:g}: {before.values[place]:.4f} -> {after.values[place]:.4f}{missed}")
        lines.append(
            f"Kept are the routers of step {after.step}, the best of {len(self.measurements)} measurements on these "
            "prompts, which makes the figure a little too good; compare on others. Their table of budgets was that of "
            "other weights and is gone: calibrate them."
        )
        return lines
