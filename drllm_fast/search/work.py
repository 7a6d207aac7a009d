"""What every executor does alike: which units are left, what becomes of failed ones, and storing results."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from drllm_fast.search.interrupts import Interrupts
from drllm_fast.search.store import Store
from drllm_fast.search.unit import Item, SearchConfig, UnitKey, UnitResult, prompt_hash

MAX_TRIES = 3  # of a unit whose worker dies
MANY_FAILED = 10  # so many failures, and fewer results, are not the units' fault


class WorkUnit(NamedTuple):
    key: UnitKey
    item: Item


class Worker(Protocol):
    def run(self, items: list[Item]) -> Iterator[UnitResult]:
        """Search the items together; yields a unit's result as soon as it is finished, in any order."""


MakeWorker = Callable[[], Worker]  # loads the model; picklable by cloudpickle where Ray is used


class Progress(Protocol):
    def advance(self, result: UnitResult) -> None: ...


class UnitsFailed(RuntimeError):
    """Some units have no result; the others are stored. `failed` maps keys' texts to reasons."""

    def __init__(self, message: str, failed: dict[str, str]) -> None:
        super().__init__(message, failed)
        self.failed = failed

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class Outcome:
    """What an executor did.

    found     units that were stored before
    finished  units searched and stored by this process
    complete  whether every unit is stored now; with several ranks the last one to end sees it
    how       how units were shared out
    """

    found: int = 0
    finished: int = 0
    complete: bool = False
    how: str = ""
    deaths: int = 0  # of workers


def work_units(items: Iterable[Item], model_hash: str, config: SearchConfig, seed: int) -> list[WorkUnit]:
    """Units of items; model_hash is that of the opened store's manifest."""
    return [
        WorkUnit(UnitKey(item.task, item.id, prompt_hash(item), model_hash, config.hash(), seed), item)
        for item in items
    ]


def unfinished(units: Sequence[WorkUnit], done: set[str]) -> list[WorkUnit]:
    """Units that are not stored, each key once."""
    return list({unit.key.text(): unit for unit in units if unit.key.text() not in done}.values())


def chunks(units: Sequence[WorkUnit], size: int) -> list[list[WorkUnit]]:
    if size < 1:
        raise ValueError(f"chunk is {size}, must be at least 1")
    return [list(units[i : i + size]) for i in range(0, len(units), size)]


@dataclass
class Queue:
    """Chunks of units to search. What a chunk left unfinished comes back unit by unit, so that the culprit is alone."""

    waiting: deque[list[WorkUnit]]
    failed: dict[str, str] = field(default_factory=dict)
    finished: int = 0
    tries: Counter[str] = field(default_factory=Counter)

    def raised(self, left: Iterable[WorkUnit], alone: bool, reason: str) -> None:
        """The worker raised, or ended without these units' results. Searches repeat exactly, so a unit that was alone
        is not tried again."""
        for unit in left:
            if alone:
                self._fail(unit, reason)
            else:
                self.waiting.append([unit])

    def died(self, left: Iterable[WorkUnit], reason: str) -> None:
        """The worker's process died while it had these units."""
        for unit in left:
            self.tries[unit.key.text()] += 1
            if self.tries[unit.key.text()] >= MAX_TRIES:
                self._fail(unit, f"its worker died {MAX_TRIES} times: {reason}")
            else:
                self.waiting.append([unit])

    def raise_failures(self) -> None:
        """UnitsFailed if there are any."""
        if self.failed:
            shown = [f"{key.split('|')[0]}/{key.split('|')[1]}: {why}" for key, why in list(self.failed.items())[:5]]
            more = f"; and {len(self.failed) - 5} more" if len(self.failed) > 5 else ""
            raise UnitsFailed(
                f"{len(self.failed)} units failed, {self.finished} were searched and stored. {'; '.join(shown)}{more}. "
                "Running the same command again tries the failed ones again",
                self.failed,
            )

    def _fail(self, unit: WorkUnit, reason: str) -> None:
        self.failed[unit.key.text()] = reason
        if len(self.failed) >= MANY_FAILED and len(self.failed) > self.finished:
            self.raise_failures()


class Writer:
    """Collects results for as long as the store asks (SQLite: not at all), puts them, and tells the progress."""

    def __init__(self, store: Store, interrupts: Interrupts, progress: Progress | None) -> None:
        self.store, self.interrupts, self.progress = store, interrupts, progress
        self._results: list[UnitResult] = []
        self._put_at = time.monotonic()

    def add(self, result: UnitResult) -> None:
        self._results.append(result)
        if time.monotonic() - self._put_at >= self.store.batch_seconds:
            self.flush()
        if self.progress is not None:
            self.progress.advance(result)

    def flush(self) -> None:
        with self.interrupts.shielded():
            if self._results:
                self.store.put(self._results)
                self._results = []
            self._put_at = time.monotonic()


@contextmanager
def storing(store: Store, progress: Progress | None) -> Iterator[Writer]:
    """A writer that puts what it has however the block ends; ctrl-C ends in a message that says how to go on."""
    with Interrupts() as interrupts:
        writer = Writer(store, interrupts, progress)
        try:
            try:
                yield writer
            finally:
                writer.flush()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; every finished unit is stored in {store.folder}, run the same command to go on"
            ) from None


def search_here(queue: Queue, worker: Worker, writer: Writer, take: Callable[[], list[WorkUnit] | None]) -> None:
    """Run chunks from `take` through a worker in this process until there is none.

    A worker that raises does not end the search: the units that it was given are tried one by one, and those that
    raise alone are failed.
    """
    while (chunk := take()) is not None:
        left = {unit.key.text(): unit for unit in chunk}
        reason = "the worker ended without its result"
        results = iter(worker.run([unit.item for unit in chunk]))
        while left:
            try:
                result = next(results)
            except StopIteration:
                break
            except Exception as error:  # whatever it is: the unit is reported by name with it
                reason = f"{type(error).__name__}: {error}"
                break
            accept(result, left)
            writer.add(result)
            queue.finished += 1
        queue.raised(left.values(), len(chunk) == 1, reason)


def accept(result: UnitResult, left: dict[str, WorkUnit]) -> None:
    """Take a result's unit out of those that are left. ValueError if it is none of them: its key is wrong."""
    if left.pop(result.key.text(), None) is None:
        raise ValueError(f"the worker gave a result for {result.key.text()!r}, which it was not asked for")
