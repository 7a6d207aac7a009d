"""Who is worked on next: which prompts are read together, and which rows decode together."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import numpy as np

from drllm_fast.generation.decode_batch import visit_places
from drllm_fast.generation.requests import Request
from drllm_fast.policies import GivenPlan


class Schedule:
    """The rows of an engine, each in one of three places.

    waiting   prompts that nobody has read yet, as they came
    ready     rows that have their first token and are not in the batch
    running   the rows of the batch
    """

    def __init__(self, max_batch: int, lookahead: int, max_prompt_tokens: int, order: str):
        self.max_batch, self.lookahead, self.max_prompt_tokens = max_batch, lookahead, max_prompt_tokens
        self.order = order
        self.waiting: deque[Request] = deque()
        self.ready: list[Request] = []
        self.running: list[Request] = []
        self._passed = 0  # rows that went before the one that is ready longest

    def __len__(self) -> int:
        return len(self.waiting) + len(self.ready) + len(self.running)

    def remove(self, request: Request) -> str | None:
        """Where it was; None if nowhere."""
        for name in ("running", "ready", "waiting"):  # thousands may wait, and most leave while they run
            queue = getattr(self, name)
            if request in queue:
                queue.remove(request)
                return name
        return None

    def prompts(self, places: int) -> list[Request]:
        """Waiting prompts, in their order, that are read now: in one forward, for one policy, with room for their keys
        and values in `places` of the pool."""
        room = self.max_batch + self.lookahead - len(self.running) - len(self.ready)
        if not self.waiting or room < 1:
            return []
        # A forward for one short prompt costs almost what it costs for several, so they are let to gather while
        # enough rows decode.
        many = len(self.running) + len(self.ready) > self.max_batch * 3 // 4
        if many and room < min(len(self.waiting), self.max_batch // 4):
            return []
        group: list[Request] = []
        tokens = 0
        for request in itertools.islice(self.waiting, room):
            tokens += len(request.prompt)
            places -= request.bound * request.capacity
            if group and (tokens > self.max_prompt_tokens or not _together(request, group[0])):
                break
            if places < 0:
                break
            group.append(request)
        return group

    def read(self, group: Sequence[Request]) -> None:
        """These prompts, the first that waited, are ready."""
        for request in group:
            assert self.waiting.popleft() is request
            self.ready.append(request)

    def refill(self) -> bool:
        """Rows that are ready join the batch; whether there were any."""
        free = min(self.max_batch - len(self.running), len(self.ready))
        if free < 1:
            return False
        every = free == len(self.ready) or self.order == "arrival"
        chosen = [self.ready[i] for i in (range(free) if every else self._suited(free))]
        self.ready = [request for request in self.ready if request not in chosen]
        self.running += chosen
        return True

    def _suited(self, free: int) -> list[int]:
        """Which of the rows that are ready come next.

        A block that n rows of the batch run costs each of them a part 1 / n of what it costs whoever runs it. So a row
        is the better suited the more rows run what it runs; it is measured by the part that it would pay more than in a
        full batch of its own path,

            sum over its visits v of 1 / (rows of the batch that run v + 1) - 1 / max_batch

        The row that came first goes first in any case once it was passed over for as many rows as eight batches have.
        """
        runs = visit_places(np.array([r.path for r in self.ready]), 0, 0)[0]
        count = visit_places(np.array([r.path for r in self.running]), 0, 0)[0].sum(0) if self.running else 0 * runs[0]
        left, chosen = list(range(len(self.ready))), []
        for _ in range(free):
            extra = (runs[left] * (1 / (count + 1) - 1 / self.max_batch)).sum(1)
            best = 0 if self._passed >= 8 * self.max_batch else int(extra.argmin())  # of equals the first that came
            self._passed = self._passed + 1 if best else 0
            chosen.append(left.pop(best))
            count = count + runs[chosen[-1]]
        return chosen


def _together(a: Request, b: Request) -> bool:
    """Whether one forward can decide both paths."""
    return a.policy is b.policy or (isinstance(a.policy, GivenPlan) and isinstance(b.policy, GivenPlan))


def joint_policy(group: Sequence[Request]) -> object:
    """What decides the paths of prompts that are read together."""
    if all(request.policy is group[0].policy for request in group):
        return group[0].policy
    return GivenPlan([request.policy.plan.flatten().tolist() for request in group])
