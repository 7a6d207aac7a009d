"""What happens while the client may leave: work that ends with it, and the stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from anyio import fail_after
from fastapi import Request, Response

from drllm_fast.generation import Delta
from drllm_fast.serving.errors import ClientGone, ServingError
from drllm_fast.serving.replies import DONE, Reply

T = TypeVar("T")
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies are to pass on what comes


async def gone(receive: Callable[[], Awaitable[dict]]) -> None:
    """Until the client has left; what it sends after the body is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. It is cancelled, and ClientGone raised, when the client leaves before."""
    return await _first(work, request.receive)


async def _first(work: Coroutine[Any, Any, T], receive: Callable[[], Awaitable[dict]]) -> T:
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone("the client has left")
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """The deltas of a job as server-sent events, up to `data: [DONE]`; what goes wrong is an event before that.

    done     called with the last delta
    timeout  seconds that the client may take to accept an event
    """

    def __init__(self, job: Any, reply: Reply, done: Callable[[Delta], None], timeout: float):
        super().__init__(media_type="text/event-stream", headers=HEADERS)
        del self.headers["content-length"]
        self.job, self.reply, self.done, self.timeout = job, reply, done, timeout

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        outcome = scope.get("drllm_fast.outcome", {})
        try:
            await _first(self._events(send, outcome), receive)
        except ServingError as error:  # nobody is there to read of it
            outcome["status"] = error.status
        finally:
            self.job.cancel()

    async def _events(self, send: Any, outcome: dict) -> None:
        async def put(body: bytes, more: bool = True) -> None:
            try:
                message = {"type": "http.response.body", "body": body, "more_body": more}
                with fail_after(self.timeout):
                    await send(message)
            except TimeoutError as error:
                raise ClientGone("the client does not read") from error

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await put(self.reply.begin())
        try:
            async with aclosing(self.job.deltas()) as deltas:
                async for delta in deltas:
                    if body := self.reply.delta(delta):
                        await put(body)
                    if delta.result is not None:
                        self.done(delta)
        except ClientGone:
            raise
        except ServingError as error:
            outcome["status"] = error.status
            await put(self.reply.failed(error))
        await put(DONE, more=False)
