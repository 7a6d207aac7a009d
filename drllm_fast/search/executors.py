"""Running units through workers: in this process, or as one rank of `torchrun` and `accelerate launch`.

Each executor leaves out what the store has, stores a result when its unit is finished, and raises `UnitsFailed` at the
end if some unit has none. `drllm_fast.search.ray_executor` is the one for clusters.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta

from drllm_fast.search.store import Store
from drllm_fast.search.work import (
    MakeWorker,
    Outcome,
    Progress,
    Queue,
    WorkUnit,
    chunks,
    search_here,
    storing,
    unfinished,
)

log = logging.getLogger(__name__)
AGENT_ANSWERS = timedelta(seconds=15)  # torchrun's agent, or it is gone


def run_local(
    make_worker: MakeWorker,
    units: Sequence[WorkUnit],
    store: Store,
    *,
    chunk: int = 1,
    progress: Progress | None = None,
) -> Outcome:
    """Search the units in this process, `chunk` prompts together."""
    todo = unfinished(units, store.done())
    queue = Queue(deque(chunks(todo, chunk)))
    outcome = Outcome(found=_count(units) - len(todo), how="one process")
    if todo:
        with storing(store, progress) as writer:
            search_here(queue, make_worker(), writer, lambda: queue.waiting.popleft() if queue.waiting else None)
    return _ended(outcome, queue, units, store)


def run_ranks(
    make_worker: MakeWorker,
    units: Sequence[WorkUnit],
    store: Store,
    *,
    chunk: int = 1,
    progress: Progress | None = None,
) -> Outcome:
    """Search this rank's share of the units; every rank is given all of them, in the same order, and a store of the
    same folder.

    Ranks never wait for one another. Under torchrun and accelerate launch they draw chunks from a counter that the
    launcher's agent keeps, so a fast rank does more and a dead one leaves its chunk only. Where RANK and WORLD_SIZE
    were set by something else, rank r has units r, r + world, ...; `Outcome.how` says which it was. torchrun stops all
    ranks when one ends with an error, UnitsFailed too; what they have in hand is searched by the next run.
    """
    rank, world = rank_and_world()
    all_units = unfinished(units, set())
    done = store.done()
    draw = _agent_counter()
    if draw is None:
        todo = unfinished(all_units[rank::world], done)
        own, how = deque(chunks(todo, chunk)), f"units {rank}, {rank + world}, ... of {len(all_units)}"
    else:
        own, how = deque(), "drawn by the ranks in turn"
    queue = Queue(own)
    outcome = Outcome(found=len({unit.key.text() for unit in all_units} & done), how=how)

    def take() -> list[WorkUnit] | None:
        if queue.waiting:
            return queue.waiting.popleft()
        while draw is not None:
            # A number is given out once, and by position in the list of all units, not of those that this rank saw
            # unfinished when it started: other ranks may have started earlier.
            try:
                start = (draw() - 1) * chunk
            except RuntimeError as error:  # all of torch.distributed's errors are
                log.warning("the launcher's agent is gone, so this rank draws no more units (%s)", error)
                return None
            if start >= len(all_units):
                return None
            if left := unfinished(all_units[start : start + chunk], done):
                return left
        return None

    first = take()
    if first is not None:
        queue.waiting.appendleft(first)
        with storing(store, progress) as writer:
            search_here(queue, make_worker(), writer, take)
    return _ended(outcome, queue, units, store)


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are. ValueError without a launcher."""
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise ValueError(
            "RANK and WORLD_SIZE are not set; start this with `torchrun --nproc-per-node N` or `accelerate launch`"
        ) from error
    if not 0 <= rank < world:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE is {world}; need 0 <= RANK < WORLD_SIZE")
    return rank, world


def _agent_counter() -> Callable[[], int] | None:
    """Draws 1, 2, 3 ..., each number in one rank only, or None without torchrun's agent.

    The agent's store outlives ranks, so no rank waits for another. A restart of the ranks counts from 1 again.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore

    # The agent's store listens at this address before a rank starts; a client does not start one. By default a rank
    # whose agent has died since would call it for five minutes.
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        shared = TCPStore(host, port, is_master=False, timeout=AGENT_ANSWERS)
    except RuntimeError as error:  # all of torch.distributed's errors are
        raise ConnectionError(
            f"the launcher's agent does not answer at {host}:{port}; it has ended, or its port cannot be reached from "
            "this machine. Every finished unit is stored, the same command goes on"
        ) from error
    name = f"drllm_fast/chunks/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return lambda: shared.add(name, 1)


def _count(units: Sequence[WorkUnit]) -> int:
    return len({unit.key for unit in units})


def _ended(outcome: Outcome, queue: Queue, units: Sequence[WorkUnit], store: Store) -> Outcome:
    queue.raise_failures()
    outcome.finished = queue.finished
    outcome.complete = not unfinished(units, store.done())
    return outcome
