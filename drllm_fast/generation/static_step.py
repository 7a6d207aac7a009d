"""A decode step whose tensors stay where they are, so that a CUDA graph can replay it for one batch after another.

It runs the visits of a *union* for all rows of a *bucket*, and each row keeps what its own path runs:

    hidden = where(the row runs the visit, block(hidden), hidden)

Rows that do not run a visit, and rows of the bucket that stand for nobody, write their keys to the last place of the
pool, which is nobody's, and attend to that. Which rows run what is data: another batch with the same union, bucket and
longest row only fills the tables. While a step is bound by reading weights and by launches, what idle rows compute
costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from drllm_fast.generation.decode_batch import visit_places
from drllm_fast.generation.decode_forward import DecodeForward
from drllm_fast.generation.kv_pool import KVPool
from drllm_fast.generation.prompt_forward import EngineCache, run_model


class StaticVisit:
    """One application of a block in a step; its tables are rows of the step's own."""

    __slots__ = ("at", "step", "keys", "values")

    def __init__(self, at: int, step: StaticStep):
        self.at, self.step = at, step
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def written(self) -> Tensor:
        return self.step.written[self.at]

    # What the attention function asks for, as of `key_rows.KeyRows`.
    def segments(self) -> tuple[list[int], list[int], list[int]]:
        step = self.step
        return [1] * step.bucket, step.starts[self.at].tolist(), step.held[self.at].tolist()

    def layout(self, device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor, int, int], bool]:
        step = self.step
        return (step.cu_seqlens, step.starts[self.at], step.held[self.at], 1, step.longest), False


class StaticStep(DecodeForward):
    """The step of `bucket` rows whose paths run visits of `union` alone and whose rows have at most `longest` tokens.

    union   bool [2 L]: visit (l, n) is 2 l + n
    logits  [bucket, V], of the last step
    """

    def __init__(self, owner: object, pool: KVPool, union: np.ndarray, bucket: int, longest: int, device: torch.device):
        super().__init__(owner, pool)
        self.bucket, self.longest = bucket, longest
        self.union = np.flatnonzero(union)
        self._layers: list[list[StaticVisit]] = [[] for _ in range(len(union) // 2)]
        for at, visit in enumerate(self.union):
            self._layers[visit // 2].append(StaticVisit(at, self))
        self.logits: Tensor | None = None

        def table(dtype: torch.dtype) -> Tensor:
            return torch.empty(len(self.union), bucket, dtype=dtype, device=device)

        self.starts, self.held = table(torch.int32), table(torch.int32)
        self.written, self.runs = table(torch.int64), table(torch.bool)
        self.tokens = torch.zeros(bucket, dtype=torch.int64, device=device)
        self.positions = torch.zeros(1, bucket, dtype=torch.int64, device=device)
        self.cu_seqlens = torch.arange(bucket + 1, dtype=torch.int32, device=device)
        empty = np.zeros((0, len(union) // 2), dtype=np.int8)
        self.fill(empty, [], [], [])

    def fill(self, plan: np.ndarray, starts: Sequence[int], capacity: Sequence[int], lengths: Sequence[int]) -> None:
        """The rows of the steps that follow; arguments as of `DecodeBatch`. One copy to the device."""
        rows = len(plan)
        runs, begins = visit_places(plan, np.asarray(starts, dtype=np.int64), np.asarray(capacity, dtype=np.int64))
        table = np.zeros((4 * len(self.union) + 1, self.bucket), dtype=np.int64)
        first, held, written, active = table[:-1].reshape(4, len(self.union), self.bucket)
        mine = np.zeros(active.shape, dtype=bool)
        mine[:, :rows] = runs[:, self.union].T
        past = np.zeros(self.bucket, dtype=np.int64)
        past[:rows] = lengths
        begin = np.full(active.shape, self.pool.size, dtype=np.int64)
        begin[:, :rows][mine[:, :rows]] = begins[:, self.union].T[mine[:, :rows]]
        first[:], active[:] = begin, mine
        # Before a step: it adds one. A row that does not run a visit has its one key in the spare place.
        held[:] = np.where(mine, past, 1)
        written[:] = np.where(mine, begin + past - 1, self.pool.size)
        table[-1] = past - 1
        moved = torch.from_numpy(table).to(self.tokens.device, non_blocking=True)
        size = len(self.union)
        for target, at in ((self.starts, 0), (self.held, 1), (self.written, 2), (self.runs, 3)):
            target.copy_(moved[at * size : (at + 1) * size])
        self.positions.copy_(moved[-1:])

    def run(self, model: nn.Module, cache: EngineCache) -> None:
        """The step itself: `tokens` in, `logits` out. Nothing in it looks at what a tensor holds."""
        self._latest = -1
        self.held.add_(self.runs)
        self.written.add_(self.runs)
        self.positions.add_(1)
        logits = run_model(model, self, cache, self.tokens, self.positions, 0)
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)

    # -- what the seams of the model ask for
    def run_layer(self, module: nn.Module, forward: Callable[..., Tensor], hidden: Tensor, *args, **kwargs) -> Tensor:
        """All visits of one block: hidden [1, bucket, d] -> [1, bucket, d]."""
        layer = self.entered(module)
        for visit in self._layers[layer]:
            self.visit = visit
            out = forward(module, hidden, *args, **kwargs)
            hidden = torch.where(self.runs[visit.at].view(1, -1, 1), out, hidden)
        return hidden
