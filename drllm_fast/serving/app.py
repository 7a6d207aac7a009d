"""The HTTP application: OpenAI's chat and text completions over a backend, which answers prompts.

A backend is a `Worker` of this process, or what sends prompts to those of others (`ray_serve`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

from anyio import fail_after
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from drllm_fast.generation import Delta, Sampling
from drllm_fast.serving.client_watch import EventStream, unless_gone
from drllm_fast.serving.errors import BadRequest, BodyTimeout, BodyTooLarge, ClientGone, ServingError, Unauthorized
from drllm_fast.serving.metrics import Metrics
from drllm_fast.serving.protocol import ChatRequest, Common, CompletionRequest, parse
from drllm_fast.serving.replies import Reply
from drllm_fast.serving.settings import ServerSettings

log = logging.getLogger("drllm_fast.serving")

# Of a body that is too large, so much is read and dropped, or the client would not get to read why it is refused.
DROPPED_BYTES = 16 << 20


class Answering(Protocol):
    def deltas(self) -> AsyncIterator[Delta]: ...

    def cancel(self) -> None: ...


class Backend(Protocol):
    """snapshot: what `Metrics` shows of it; accepting: whether it takes requests; alive: whether it can answer them"""

    snapshot: Any
    accepting: bool

    @property
    def alive(self) -> bool: ...

    async def submit(
        self, prompt: Any, sampling: Sampling, *, budget: float | None, whole: bool, timeout: float
    ) -> Answering: ...


def create_app(backend: Backend, settings: ServerSettings) -> FastAPI:
    """POST /v1/chat/completions and /v1/completions, GET /v1/models, /health and /metrics."""
    app = FastAPI(title="drllm-fast", description="OpenAI-compatible; each prompt runs its own layers.")
    metrics = Metrics(lambda: backend.snapshot)
    app.state.backend, app.state.metrics = backend, metrics
    started = int(time.time())

    @app.post("/v1/chat/completions", openapi_extra=_documented(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await answer_or_say_why_not(request, ChatRequest)

    @app.post("/v1/completions", openapi_extra=_documented(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await answer_or_say_why_not(request, CompletionRequest)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request)
        model = {"id": settings.model, "object": "model", "created": started, "owned_by": "drllm-fast"}
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 as long as requests are taken and answered."""
        state = "engine failed" if not backend.alive else "ok" if backend.accepting else "shutting down"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics")
    async def scrape() -> Response:
        text, kind = metrics.text()
        return Response(text, media_type=kind)

    def check_key(request: Request) -> None:
        if settings.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        sent = key.strip().encode("latin-1")  # as headers are decoded
        if not (secrets.compare_digest(sent, settings.api_key.encode()) and scheme.lower() == "bearer"):
            raise Unauthorized("no valid API key; send the header Authorization: Bearer KEY")

    async def answer_or_say_why_not(request: Request, kind: type[Common]) -> Response:
        try:
            return await answer(request, kind)
        except ServingError as error:
            return await refused(request, error)
        except Exception as error:  # answered here, since Starlette's handler raises on, which ends the connection
            log.exception("a defect")
            return await refused(request, ServingError(f"a defect of the server ({type(error).__name__})"))

    async def answer(request: Request, kind: type[Common]) -> Response:
        arrived = time.monotonic()
        check_key(request)
        try:
            with fail_after(settings.timeout):
                body = await read_body(request, settings.max_body_bytes)
        except TimeoutError as error:
            raise BodyTimeout(f"the body of the request did not arrive within {settings.timeout:g} s") from error
        asked = parse(kind, body, settings)
        sampling = asked.sampling(settings)
        endpoint = ENDPOINTS[0 if kind is ChatRequest else 1]

        async def submitted() -> Answering:
            return await backend.submit(
                asked.for_engine(),
                sampling,
                budget=asked.budget,
                whole=not asked.stream,
                timeout=settings.timeout - (time.monotonic() - arrived),
            )

        async def whole() -> Delta:
            return [delta async for delta in (await submitted()).deltas()][-1]

        reply = Reply(settings.model, kind is ChatRequest, asked.usage_in_stream)

        def done(delta: Delta) -> None:
            metrics.answered(endpoint, delta.result, time.monotonic() - arrived)

        if asked.stream:
            return EventStream(await unless_gone(request, submitted()), reply, done, settings.timeout)
        delta = await unless_gone(request, whole())
        done(delta)
        return JSONResponse(reply.whole(delta.result))

    @app.exception_handler(ServingError)
    async def refused(request: Request, error: ServingError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        """No such path or method."""
        body = BadRequest(f"{request.method} {request.url.path}: {error.detail}").body()
        return JSONResponse(body, error.status_code, headers=error.headers)

    app.add_middleware(CountedRequests, metrics=metrics)
    return app


async def read_body(request: Request, limit: int) -> bytes:
    """The body; BodyTooLarge, without having kept it, where it is longer than `limit`. ClientGone."""
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
            else:
                parts.clear()
            if size > max(limit, DROPPED_BYTES):
                break
    except ClientDisconnect as error:
        raise ClientGone("the client has left") from error
    if size > limit:
        raise BodyTooLarge(f"the body of a request has at most {limit} bytes")
    return b"".join(parts)


class CountedRequests:
    """Counts each request by endpoint and status. A stream that fails after its beginning says so in the scope."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        outcome = scope["drllm_fast.outcome"] = {"status": 500}

        async def sent(message: dict) -> None:
            if message["type"] == "http.response.start":
                outcome["status"] = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sent)
        except asyncio.CancelledError:  # by a server that does so when the client leaves
            outcome["status"] = 499
            raise
        finally:
            endpoint = scope["path"] if scope["path"] in ENDPOINTS else "other"
            self.metrics.requests.labels(endpoint, str(outcome["status"])).inc()


ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")


def _documented(kind: type[Common]) -> dict[str, Any]:
    """For /docs: bodies are read by hand, so that they can be refused before they are parsed."""
    schema = kind.model_json_schema()
    parts = schema.pop("$defs", {})

    def whole(part: Any) -> Any:
        """With what it refers to in its place: the document has no other place for it."""
        if isinstance(part, dict) and "$ref" in part:
            return whole(parts[part["$ref"].rpartition("/")[2]])
        if isinstance(part, dict):
            return {name: whole(value) for name, value in part.items()}
        return [whole(value) for value in part] if isinstance(part, list) else part

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": whole(schema)}}}}
