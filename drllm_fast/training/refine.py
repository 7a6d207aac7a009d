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
from torch import nn
from tqdm.auto import tqdm

from drllm_fast.decoder import unwrap
from drllm_fast.paths import prompt_batches
from drllm_fast.routers import PURE_ROUTER, LayerRouters
from drllm_fast.search.unit import Item, prompt_hash
from drllm_fast.training import fit_checkpoint
from drllm_fast.training.fit_inputs import split, weights_hash
from drllm_fast.training.path_values import PathValues
from drllm_fast.training.refine_config import RefineConfig
from drllm_fast.training.refine_report import Measurement, RefineReport
from drllm_fast.training.refine_state import Refinement
from drllm_fast.training.trackers import Tracker


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
    state = Refinement(model, routers, values, training, held, config, max_tokens)
    if folder is not None:
        folder = Path(folder)
        stored = fit_checkpoint.read(folder, identity)
        fit_checkpoint.prepare(folder)
        if stored is not None:
            report.measurements = [Measurement(**measurement) for measurement in stored[0]]
            state.load(stored[1])

    def measure(begun: float, steps: list[dict[str, torch.Tensor]]) -> None:
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
