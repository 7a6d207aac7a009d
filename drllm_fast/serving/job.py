"""A prompt on its way through the worker, as the coroutine sees it that waits for the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from anyio import fail_after

from drllm_fast.generation import Delta
from drllm_fast.generation.requests import Request
from drllm_fast.serving.errors import ServingError, TimedOut


class Job:
    """A prompt on its way through the worker, for the event loop that submitted it.

    drop      called with it, from any thread, to let the engine drop it; does nothing for one that has ended
    whole     whether the whole answer is wanted alone, not what it grows by
    deadline  of `time.monotonic`
    """

    def __init__(self, drop: Callable[[Job], None], whole: bool, deadline: float):
        self._drop, self.whole, self.deadline = drop, whole, deadline
        self.loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = self.loop.create_future()
        self.request: Request | None = None  # this and `ended` belong to the engine's thread
        self.ended = False
        self._items: asyncio.Queue[Delta | ServingError] = asyncio.Queue()

    async def deltas(self) -> AsyncIterator[Delta]:
        """What is new, up to the whole result; that alone for a job that was submitted as `whole`. Whoever stops
        before the end, or is cancelled, cancels the job. Raises ServingError."""
        try:
            while True:
                item = self._items.get_nowait() if self._items.qsize() else await self.in_time(self._items.get())
                if isinstance(item, ServingError):
                    raise item
                yield item
                if item.result is not None:
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        self._drop(self)

    async def in_time(self, awaitable: Any) -> Any:
        """What it gives before the deadline, else TimedOut."""
        # Not asyncio.wait_for, which before Python 3.12 swallows a cancellation that meets a result.
        try:
            with fail_after(max(0.0, self.deadline - time.monotonic())):
                return await awaitable
        except TimeoutError as error:
            raise TimedOut("the answer took longer than this server allows; ask for fewer tokens") from error

    # Called in the event loop, with what the engine's thread sent.
    def receive(self, item: Delta | ServingError | None) -> None:
        if self.accepted.done():
            if item is not None:
                self._items.put_nowait(item)
        elif isinstance(item, ServingError):
            self.accepted.set_exception(item)
        else:
            self.accepted.set_result(None)


def receive(items: list[tuple[Job, Any]]) -> None:
    for job, item in items:
        job.receive(item)
