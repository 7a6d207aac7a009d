"""Running units through Ray actors, on one machine or a cluster.

The driver keeps the queue and alone writes to the store: every unit is stored once, a store of either kind will do, and
actors on other machines need not see the output folder. Results are some kilobytes each. An actor has one chunk at a
time and streams its results back; when it dies, the driver starts another and queues what was left of the chunk.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from drllm_fast.search.store import Store
from drllm_fast.search.unit import Item, UnitResult
from drllm_fast.search.work import (
    MakeWorker,
    Outcome,
    Progress,
    Queue,
    UnitsFailed,
    WorkUnit,
    Writer,
    accept,
    chunks,
    storing,
    unfinished,
)

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported

try:
    import ray
    from ray.exceptions import RayActorError, RayTaskError
except ImportError as error:
    raise ImportError('Ray is not installed: pip install "drllm-fast[ray]"') from error

log = logging.getLogger(__name__)
PATIENCE = 60.0  # seconds without any result or death, after which a waiting driver says what it waits for


class _Actor:
    """A worker in a process of its own."""

    def __init__(self, make_worker: MakeWorker) -> None:
        self.worker = make_worker()

    def run(self, items: list[Item]) -> Iterator[UnitResult]:
        yield from self.worker.run(items)


class _Crew:
    """The actors and what each has. A slot is a place for an actor; it gets a new one when its actor dies."""

    def __init__(self, make_worker: MakeWorker, options: dict[str, Any]) -> None:
        self._make = ray.remote(_Actor).options(**options)
        self._make_worker = ray.put(make_worker)
        self.actors: dict[int, Any] = {}
        self.streams: dict[Any, int] = {}  # of results, and the slot it comes from
        self.chunk: dict[int, list[WorkUnit]] = {}
        self.left: dict[int, dict[str, WorkUnit]] = {}

    def give(self, slot: int, chunk: list[WorkUnit]) -> None:
        if slot not in self.actors:
            self.actors[slot] = self._make.remote(self._make_worker)
        stream = self.actors[slot].run.options(num_returns="streaming").remote([unit.item for unit in chunk])
        self.streams[stream], self.chunk[slot] = slot, chunk
        self.left[slot] = {unit.key.text(): unit for unit in chunk}

    def close(self) -> None:
        for actor in self.actors.values():
            ray.kill(actor)


def run_ray(
    make_worker: MakeWorker,
    units: Sequence[WorkUnit],
    store: Store,
    *,
    workers: int,
    address: str | None = None,
    chunk: int = 1,
    progress: Progress | None = None,
    num_cpus: float = 1.0,
    num_gpus: float | None = None,
    temp_dir: str | None = None,
) -> Outcome:
    """Search the units in `workers` actors, `chunk` prompts together in each.

    address    of a cluster, or "auto" for the one that runs here; None: RAY_ADDRESS, or a Ray of its own that ends
               with the call. A Ray that is initialised already is used, and left running.
    num_cpus   and num_gpus: of each actor; by default one GPU where the cluster has any. Leave the cluster a CPU if Ray
               Data runs there, too.
    temp_dir   of its own Ray; a short path, sockets in it have at most 107 characters

    Raises UnitsFailed at the end for units that raised, or whose worker died three times; the others are stored.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, must be at least 1")
    todo = unfinished(units, store.done())
    queue = Queue(deque(chunks(todo, chunk)))
    outcome = Outcome(found=len({unit.key for unit in units}) - len(todo), how=f"{workers} Ray actors")
    if todo:
        own = _connect(address, workers, num_cpus, temp_dir)  # it sets a handler of SIGTERM, so before `storing` does
        if num_gpus is None:
            num_gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
        crew = _Crew(make_worker, {"num_cpus": num_cpus, "num_gpus": num_gpus})
        try:
            with storing(store, progress) as writer:
                _drive(crew, queue, writer, outcome, workers)
        finally:
            crew.close()
            if own:
                ray.shutdown()
    queue.raise_failures()
    outcome.finished = queue.finished
    outcome.complete = not unfinished(units, store.done())
    return outcome


def _drive(crew: _Crew, queue: Queue, writer: Writer, outcome: Outcome, workers: int) -> None:
    while True:
        for idle in sorted(set(range(workers)) - set(crew.streams.values())):
            if queue.waiting:
                crew.give(idle, queue.waiting.popleft())
        if not crew.streams:
            return
        ready, _ = ray.wait(list(crew.streams), num_returns=1, timeout=PATIENCE, fetch_local=False)
        if not ready:
            free, wanted = ray.available_resources(), len(crew.actors)
            log.warning("no result for %.0f s from %d actors; free in the cluster: %s", PATIENCE, wanted, free)
            continue
        stream = ready[0]
        slot = crew.streams[stream]
        left = crew.left[slot]
        try:
            result = ray.get(next(stream))
        except StopIteration:
            queue.raised(left.values(), len(crew.chunk[slot]) == 1, "the worker ended without its result")
        except RayTaskError as error:
            queue.raised(left.values(), len(crew.chunk[slot]) == 1, _short(error))
        except RayActorError as error:
            _bury(crew, slot, error)
            outcome.deaths += 1
            if error.preempted:  # the cluster took the machine; no unit is to blame
                queue.raised(left.values(), False, "")
            else:
                queue.died(left.values(), _short(error))
        else:
            accept(result, left)
            writer.add(result)
            queue.finished += 1
            continue
        del crew.streams[stream]


def _bury(crew: _Crew, slot: int, error: RayActorError) -> None:
    """Forget a dead actor. UnitsFailed where another would die as well: the worker cannot be made."""
    ray.kill(crew.actors.pop(slot))  # one that is only out of reach would go on with a chunk that is another's now
    if error.actor_init_failed:
        raise UnitsFailed(f"the worker could not be made: {_short(error)}", {}) from error
    log.warning("worker %d died (%s); starting another", slot, _short(error))


def _short(error: Exception) -> str:
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {cause}"
    return str(error).strip().splitlines()[-1][:300]


def _connect(address: str | None, workers: int, num_cpus: float, temp_dir: str | None) -> bool:
    """Whether a Ray was started or joined here, to be left at the end."""
    if ray.is_initialized():
        return False
    if address is not None or os.environ.get("RAY_ADDRESS"):
        ray.init(address=address, log_to_driver=False)
        return True
    # CPUs are a count of Ray's, not a limit: enough for every actor, so that none waits for ever.
    cpus = max(int(workers * num_cpus + 0.999), 1)
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, _temp_dir=temp_dir)
    return True
