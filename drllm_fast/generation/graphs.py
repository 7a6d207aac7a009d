"""Decode steps replayed from CUDA graphs: one for each union of visits, bucket of rows and bucket of lengths that comes
up again and again, as many as fit, and only where replaying was measured to be faster."""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from drllm_fast.generation.decode_batch import DecodeBatch
from drllm_fast.generation.kv_pool import KVPool
from drllm_fast.generation.prompt_forward import EngineCache
from drllm_fast.generation.static_step import StaticStep

log = logging.getLogger(__name__)

SEEN = 3  # steps of a key that are run as they are, and timed, before it is captured
TRIALS = 5  # replays that are timed before they may be given up


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """What replays `run`, which has been captured; its rows stand for nobody meanwhile."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles kernels and makes workspaces, which a capture must not
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class GraphedSteps:
    """What makes the batches of an engine, in place of `DecodeBatch`.

    required  a step that cannot be captured is an error; else it is run as it is from then on
    limit     graphs kept; the one that was used least recently goes
    capture   makes of a function without arguments one that replays it
    """

    def __init__(
        self,
        owner: object,
        pool: KVPool,
        model: nn.Module,
        cache: EngineCache,
        device: torch.device,
        *,
        required: bool = False,
        limit: int = 32,
        capture: Callable[[Callable[[], None]], Callable[[], None]] = capture,
    ):
        self.owner, self.pool, self.model, self.cache, self.device = owner, pool, model, cache, device
        self.required, self.limit, self.capture = required, limit, capture
        self.graphs: OrderedDict[tuple, tuple[StaticStep, Callable[[], None]]] = OrderedDict()
        self.plain: dict[tuple, list[float]] = {}  # seconds of steps that were run as they are
        self.replayed: dict[tuple, list[float]] = {}
        self.slower: set[tuple] = set()  # keys whose graphs were given up
        self.captures = Counter()

    def batch(
        self, plan: np.ndarray, starts: Sequence[int], capacity: Sequence[int], lengths: Sequence[int]
    ) -> GraphedBatch:
        """Arguments as of `DecodeBatch`."""
        return GraphedBatch(self, plan, starts, capacity, lengths)

    def graph_of(self, key: tuple, union: np.ndarray) -> tuple[StaticStep, Callable[[], None]] | None:
        """The step of a key and what replays it; None while it is not worth a graph."""
        if key in self.graphs:
            self.graphs.move_to_end(key)
            return self.graphs[key]
        if key in self.slower or not self.limit or len(self.plain.get(key, ())) < SEEN:
            return None
        while len(self.graphs) >= self.limit:
            self.graphs.popitem(last=False)
        _, bucket, longest = key
        step = StaticStep(self.owner, self.pool, union, bucket, longest, self.device)
        try:
            replay = self.capture(lambda: step.run(self.model, self.cache))
        except RuntimeError as error:  # the model looks at what a tensor holds, as mixtures of experts may
            if self.required:
                raise RuntimeError(
                    f"a decode step of this model cannot be captured in a CUDA graph ({error}); use graphs=False"
                ) from error
            log.warning("decode steps run without CUDA graphs, since one cannot be captured: %s", error)
            self.limit = 0
            return None
        self.captures[key] += 1
        self.graphs[key] = step, replay
        return self.graphs[key]

    def note(self, key: tuple, replayed: bool, seconds: float) -> None:
        """What a step took; graphs that are no faster are given up, unless they are asked for."""
        if replayed and self.required:
            return
        (self.replayed if replayed else self.plain).setdefault(key, []).append(seconds)
        if not replayed:
            del self.plain[key][: -4 * SEEN]
        elif len(self.replayed[key]) == TRIALS:
            if statistics.median(self.replayed.pop(key)) > statistics.median(self.plain[key]):
                self.slower.add(key)
                self.graphs.pop(key, None)


class GraphedBatch:
    """As a `DecodeBatch`: rows that decode together, by a graph where there is one for them."""

    def __init__(
        self,
        steps: GraphedSteps,
        plan: np.ndarray,
        starts: Sequence[int],
        capacity: Sequence[int],
        lengths: Sequence[int],
    ):
        self.steps, self.rows = steps, (plan, starts, capacity)
        self.lengths = list(lengths)
        self.union = np.stack((plan >= 1, plan == 2), axis=2).any(axis=0).ravel()
        self.visits = int(self.union.sum())
        self._plain: DecodeBatch | None = None
        self._filled: StaticStep | None = None

    def step(self, model: nn.Module, cache: EngineCache, tokens: Tensor) -> Tensor:
        longest = max(self.lengths) + 1
        key = self.union.tobytes(), _bucket(len(self.lengths)), _bucket(longest, least=128)
        graph = self.steps.graph_of(key, self.union)
        began = time.perf_counter()
        logits = self._run_plain(model, cache, tokens) if graph is None else self._replay(*graph, tokens)
        if self.steps.device.type == "cuda":
            torch.cuda.current_stream(self.steps.device).synchronize()  # the next token is waited for in any case
        if self.visits:
            self.steps.note(key, graph is not None, time.perf_counter() - began)
        self.lengths = [n + 1 for n in self.lengths]
        return logits

    def _run_plain(self, model: nn.Module, cache: EngineCache, tokens: Tensor) -> Tensor:
        if self._plain is None:
            self._plain = DecodeBatch(self.steps.owner, self.steps.pool, *self.rows, self.lengths, self.steps.device)
        self._filled = None
        return self._plain.step(model, cache, tokens)

    def _replay(self, step: StaticStep, replay: Callable[[], None], tokens: Tensor) -> Tensor:
        if self._filled is not step:
            step.fill(*self.rows, self.lengths)
            self._filled, self._plain = step, None
        step.tokens[: len(tokens)].copy_(tokens)
        replay()
        return step.logits[: len(tokens)]


def _bucket(n: int, least: int = 1) -> int:
    """The power of two from n on, `least` at least."""
    return max(least, 1 << (n - 1).bit_length())


def wanted(graphs: bool | None, device: torch.device) -> bool:
    """Whether steps are captured; None: on CUDA devices. ValueError where that is not possible."""
    if graphs and device.type != "cuda":
        raise ValueError(f"graphs=True, but the model is on {device}; CUDA graphs need a CUDA device")
    return device.type == "cuda" if graphs is None else graphs
