"""What an engine measures of the machine that it runs on, once, and keeps: which products are faster, and what a decode
step costs.

    seconds of a step = fixed + sum over the visits v that run of (visit + row x rows that run v)

`visit` is what a block costs whoever runs it (its weights are read, its kernels launched), which rows of like paths
share; `row` is what each row adds.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from drllm_fast.atomic import written
from drllm_fast.generation.decode_batch import DecodeBatch
from drllm_fast.generation.kv_pool import KVPool
from drllm_fast.generation.packed_weights import linear_seconds
from drllm_fast.smollm2 import cache_dir

if TYPE_CHECKING:
    from drllm_fast.generation.engine import Engine

ROWS = (1, 4, 16, 64)  # of the steps that are measured
FIXED_SHARE = 0.05  # a batch is large enough when its rows bring what they share down to this part of their own cost
BATCHES = (8, 256)  # the smallest and largest batch that is chosen


@dataclass(frozen=True)
class StepCost:
    """Seconds, as above."""

    fixed: float
    visit: float
    row: float

    def batch_size(self) -> int:
        """How many rows make a batch in which the share of `visit` is FIXED_SHARE of a row's own cost."""
        rows = BATCHES[0]
        while rows < BATCHES[1] and self.visit > FIXED_SHARE * rows * self.row:
            rows *= 2
        return rows


def packing_pays(layers: list[nn.Linear]) -> bool:
    """Whether a decode step takes less time in packed products, for 8 and 64 rows together."""
    key = ["packed", *sorted({f"{tuple(layer.weight.shape)} {layer.weight.dtype}" for layer in layers})]

    def measure() -> dict[str, float]:
        plain, fast = np.sum([linear_seconds(layers, rows) for rows in (8, 64)], axis=0).tolist()
        return {"plain": plain, "packed": fast}

    seconds = kept(key, "cpu", measure)
    return seconds["packed"] < seconds["plain"]


def step_cost(engine: Engine) -> StepCost:
    """The cost of this engine's steps, from the file of what was measured or measured now; its pool must be empty."""
    config = engine.decoder.config
    key = [type(engine.top).__name__, engine.decoder.dtype, engine.packs, engine.num_layers]
    key += [getattr(config, name, None) for name in ("hidden_size", "intermediate_size", "vocab_size")]
    measured = kept([str(part) for part in key], engine.device.type, lambda: asdict(_measure_steps(engine)))
    return StepCost(**measured)


def _measure_steps(engine: Engine) -> StepCost:
    layers = engine.num_layers
    rest, blocks = [], []
    engine.pack()
    with torch.inference_mode():
        for rows in ROWS:
            pool = KVPool(rows * layers * 8)
            rest.append(_step_seconds(engine, pool, [0] * layers, rows))
            blocks.append((_step_seconds(engine, pool, [1] * layers, rows) - rest[-1]) / layers)
    slope, intercept = np.polyfit(ROWS, blocks, 1)
    # Noise may say that more rows cost nothing, or less than nothing.
    row = max(float(slope), blocks[-1] / ROWS[-1] / 100)
    return StepCost(fixed=rest[0], visit=max(float(intercept), 0.0), row=row)


def _step_seconds(engine: Engine, pool: KVPool, path: list[int], rows: int, repeats: int = 3) -> float:
    """The median time of a decode step of rows with this path, after two tokens."""
    plan = np.tile(np.array(path, dtype=np.int8), (rows, 1))
    starts = [row * engine.num_layers * 8 for row in range(rows)]
    tokens = torch.ones(rows, dtype=torch.int64, device=engine.device)
    seconds = []
    for _ in range(repeats + 1):
        batch = DecodeBatch(engine._owner, pool, plan, starts, [8] * rows, [2] * rows, engine.device)
        began = time.perf_counter()
        batch.step(engine.top, engine._cache, tokens)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def kept(what: list[str], device: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, from the file where it was measured before, on this machine with this torch."""
    about = [*what, machine(device), str(torch.get_num_threads()), torch.__version__]
    folder = cache_dir() / "measured"
    file = folder / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))["measured"]
    except (OSError, ValueError, KeyError):  # not there, or damaged: it can be made again
        pass
    measured = measure()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written(file) as part:
            part.write(json.dumps({"about": about, "measured": measured}, indent=1).encode())
    except OSError:  # a home that cannot be written to: it is measured again next time
        pass
    return measured


def machine(device: str) -> str:
    """A name for the processor that measurements were made on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {os.cpu_count()} processors"
