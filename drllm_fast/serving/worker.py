"""One thread that owns the engine, and what coroutines see of it.

submit --a place is reserved, prompt tokenised in a thread of its own--> accepted by the engine --deltas--> ended
   a job leaves its place when the engine has let go of its row, however that came about
"""

from __future__ import annotations

import asyncio
import copy
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jinja2 import TemplateError

from drllm_fast.generation import Engine, Sampling
from drllm_fast.generation.requests import encode
from drllm_fast.serving.errors import BadRequest, EngineFailed, Full, Unavailable
from drllm_fast.serving.job import Job, receive

log = logging.getLogger("drllm_fast.serving")


@dataclass(frozen=True)
class Snapshot:
    """Of the engine, after its last step: rows that wait or are worked on, and what they hold."""

    waiting: int = 0
    running: int = 0
    kv_bytes: int = 0
    pool_used: int = 0
    pool_size: int = 0


class Worker:
    """Runs an engine for the coroutines of any event loop.

    max_requests       at most so many prompts wait or are worked on, all together
    max_prompt_tokens  of one prompt

    The engine's thread outlives what a forward raises: exactly the requests of that forward fail. It ends when the
    device is lost (`torch.AcceleratorError`) or the engine itself fails; then `alive` is False and all is refused.
    """

    def __init__(self, engine: Engine, *, max_requests: int = 256, max_prompt_tokens: int = 8192):
        if max_requests < 1:
            raise ValueError(f"max_requests must be at least 1, got {max_requests}")
        self.engine, self.max_requests, self.max_prompt_tokens = engine, max_requests, max_prompt_tokens
        self.held = 0  # places taken
        self.accepting = True
        self.snapshot = Snapshot()
        # A tokenizer is not to be used by two threads at once.
        self._tokenizer = copy.deepcopy(engine.tokenizer)
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="drllm-tokenizer")
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}  # by the index of their request; this and the engine belong to the thread
        self._lock = threading.Lock()
        self._stop = False
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._gone: str | None = None  # why there is no thread any more
        self._thread = threading.Thread(target=self._run, name="drllm-engine", daemon=True)

    def start(self) -> Worker:
        """Raises what the engine raises for this model."""
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error
        return self

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._gone is None

    async def submit(
        self,
        prompt: str | Sequence[int] | Sequence[dict],
        sampling: Sampling,
        *,
        budget: float | None = None,
        whole: bool = False,
        timeout: float = 120.0,
    ) -> Job:
        """A job that the engine has accepted. Raises BadRequest for what it does not take, Full, TimedOut,
        Unavailable."""
        with self._lock:
            if not self.accepting or self._gone:
                raise Unavailable(self._gone or "the server is shutting down")
            if self.held >= self.max_requests:
                raise Full(
                    f"{self.held} requests wait or are being answered, which is all this server takes; try again"
                )
            self.held += 1
        job = Job(self.drop, whole, time.monotonic() + timeout)
        try:
            ids = await job.in_time(job.loop.run_in_executor(self._encoder, self._encode, prompt))
        except BaseException:
            self._end(job, None)
            raise
        self.call(partial(self._accept, job, ids, sampling, budget))
        try:
            await job.in_time(job.accepted)
        except BaseException:
            job.cancel()
            raise
        return job

    def _encode(self, prompt: Any) -> list[int]:
        try:
            ids = encode(self._tokenizer, prompt)
        except (TypeError, ValueError, TemplateError) as error:
            raise BadRequest(str(error)) from error
        if not ids:
            raise BadRequest("the chat template makes no token of these messages")
        if len(ids) > self.max_prompt_tokens:
            raise BadRequest(f"the prompt has {len(ids)} tokens, this server takes at most {self.max_prompt_tokens}")
        return ids

    def drop(self, job: Job) -> None:
        """Let the engine drop it, if it has not ended; from any thread."""
        self.call(partial(self._drop, job))

    def refuse_new(self) -> None:
        """What is here is answered, nothing new is taken."""
        with self._lock:
            self.accepting = False

    def close(self, timeout: float = 30.0) -> None:
        """Cancel what is left and end the thread."""
        self.refuse_new()
        self.call(lambda: setattr(self, "_stop", True))
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._encoder.shutdown(wait=False, cancel_futures=True)

    def call(self, function: Callable[[], None]) -> None:
        """Run it in the engine's thread, between two steps."""
        with self._lock:
            if self._gone is None:
                self._calls.put(function)
                return
        function()  # the thread has ended, so that nobody else touches what it owned

    # -- in the engine's thread
    def _run(self) -> None:
        why = "the server is shutting down"
        try:
            with self.engine:
                self._look()
                self._started.set()
                while not self._stop:
                    self._take_calls()
                    if self.engine.busy and not self._stop:
                        self._step()
                    self._look()
        except BaseException as error:
            if self._started.is_set():
                log.exception("the engine's thread ends")
            self._error = error
            why = f"the engine has failed ({type(error).__name__}: {error})"
        with self._lock:
            self._gone = why
        self._started.set()
        while not self._calls.empty():
            self._calls.get()()
        self._send([(job, self._end(job, Unavailable(why))) for job in list(self._jobs.values())])
        if self.engine.pool is not None:
            self._look()

    def _take_calls(self) -> None:
        if not self.engine.busy:
            self._calls.get()()
            self._look()
        while not self._calls.empty():
            self._calls.get()()

    def _accept(self, job: Job, ids: list[int], sampling: Sampling, budget: float | None) -> None:
        if job.ended:
            return
        if self._gone or self._stop:
            self._send([(job, self._end(job, Unavailable(self._gone or "the server is shutting down")))])
            return
        try:
            job.request = self.engine.submit(ids, sampling, budget=budget)
        except (TypeError, ValueError) as error:
            self._send([(job, self._end(job, BadRequest(str(error))))])
            return
        except Exception as error:  # of a policy, perhaps
            log.exception("a prompt was not accepted")
            self._send([(job, self._end(job, EngineFailed(f"the engine failed ({type(error).__name__})")))])
            return
        self._jobs[job.request.index] = job
        self._send([(job, None)])

    def _drop(self, job: Job) -> None:
        if not job.ended:
            if job.request is not None:
                self.engine.cancel(job.request)
            self._end(job, None)

    def _end(self, job: Job, item: Any) -> Any:
        """The job leaves its place; `item` is the last that it is sent."""
        with self._lock:  # once the thread has ended, a late `_drop` runs in another
            if not job.ended:
                job.ended = True
                self.held -= 1
        if job.request is not None:
            self._jobs.pop(job.request.index, None)
        return item

    def _step(self) -> None:
        try:
            deltas = self.engine.step()
        except torch.AcceleratorError:  # nothing runs on that device any more, in this process
            raise
        except Exception as error:
            log.exception("a forward failed")
            self._fail(EngineFailed(f"the engine failed on this request ({type(error).__name__})"))
            return
        out = []
        for delta in deltas:
            job = self._jobs.get(delta.index)
            if job is not None and (delta.result is not None or not job.whole):
                out.append((job, delta if delta.result is None else self._end(job, delta)))
        self._send(out)

    def _fail(self, error: EngineFailed) -> None:
        """The jobs whose rows ended in a step that raised, with or without a result: nobody has got that."""
        failed = [job for job in self._jobs.values() if job.request.finish_reason is not None]
        if not failed:  # then the next step would raise the same
            failed = list(self._jobs.values())
            for job in failed:
                self.engine.cancel(job.request)
        self._send([(job, self._end(job, error)) for job in failed])

    def _look(self) -> None:
        engine = self.engine
        rows = [*engine.schedule.ready, *engine.schedule.running]
        held = sum(row.visits * row.held for row in rows) * engine.pool.bytes_per_token()
        self.snapshot = Snapshot(len(engine.schedule.waiting), len(rows), held, engine.pool.used, engine.pool.size)

    def _send(self, items: list[tuple[Job, Any]]) -> None:
        """To the event loops, in one call each."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Job, Any]]] = {}
        for job, item in items:
            loops.setdefault(job.loop, []).append((job, item))
        for loop, some in loops.items():
            try:
                loop.call_soon_threadsafe(receive, some)
            except RuntimeError:  # the loop is closed, and with it all who would listen
                log.debug("answers for an event loop that is closed")
