"""The server under Ray Serve: replicas with a model and a worker each, and before them one ingress, which speaks HTTP.

Serve itself re-sends a request only as long as no replica has taken it. The ingress re-sends one whose replica died
for as long as nothing of its answer has gone out, which for answers that are not streamed is until the end. Every
request has a seed by then, so that the second answer is the first one, to rounding.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from anyio import fail_after
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from drllm_fast.generation import Delta, Sampling
from drllm_fast.serving.errors import EngineFailed, Full, ServingError, TimedOut, Unavailable
from drllm_fast.serving.settings import ServerSettings
from drllm_fast.serving.start import EngineSpec, start_worker

log = logging.getLogger("drllm_fast.serving")

APP, MODEL = "drllm-fast", "Model"
DEATHS = (RayActorError, WorkerCrashedError, ObjectLostError, ReplicaUnavailableError)
ATTEMPTS, PAUSE = 4, 0.2  # how often a request is sent at most, and the seconds before each further time


class Model:
    """One replica."""

    def __init__(self, spec: EngineSpec):
        self.worker = start_worker(spec)

    async def answer(
        self, prompt: Any, sampling: Sampling, budget: float | None, whole: bool, timeout: float
    ) -> AsyncIterator[Delta | ServingError | None]:
        """None once the engine has accepted the prompt, then its deltas; a ServingError is the last item."""
        try:
            job = await self.worker.submit(prompt, sampling, budget=budget, whole=whole, timeout=timeout)
            try:
                yield None
                async for delta in job.deltas():
                    yield delta
            finally:
                job.cancel()
        except ServingError as error:
            yield error

    def state(self) -> dict[str, int]:
        """Which process this is, the requests here, the places of the pool that they hold, and the tokens ever made."""
        worker = self.worker
        return {
            "process": os.getpid(),
            "requests": worker.held,
            "pool_used": worker.snapshot.pool_used,
            "tokens": worker.engine.stats.tokens,
        }

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if not self.worker.alive:
            raise RuntimeError("the engine's thread has ended")

    def __del__(self) -> None:
        if hasattr(self, "worker"):
            self.worker.close()


class RemoteJob:
    """A prompt that some replica answers. It leaves its place when it is cancelled, which each job is at its end."""

    def __init__(self, replicas: Replicas, arguments: tuple, timeout: float):
        self.replicas: Replicas | None = replicas
        self.handle, self.arguments, self.deadline = replicas.handle, arguments, time.monotonic() + timeout
        self.replies: Any = None
        self.attempts = 0
        replicas.held += 1

    async def connect(self) -> RemoteJob:
        """Until a replica has accepted it."""
        while True:
            self.attempts += 1
            self.replies = self.handle.answer.remote(*self.arguments, self.deadline - time.monotonic())
            try:
                await self._next()
                return self
            except (*DEATHS, Unavailable) as error:
                await self._pause(error)
            except BaseException:
                self.cancel()
                raise

    async def deltas(self) -> AsyncIterator[Delta]:
        begun = False
        try:
            while True:
                try:
                    delta = await self._next()
                except (*DEATHS, Unavailable) as error:
                    if begun:
                        raise EngineFailed("the replica that answered has died; send the request again") from error
                    await self._pause(error)
                    await self.connect()
                    continue
                begun = True
                yield delta
                if delta.result is not None:
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        if self.replies is not None:
            self.replies.cancel()
        if self.replicas is not None:
            self.replicas.held -= 1
            self.replicas = None

    async def _pause(self, error: Exception) -> None:
        """Before it is sent again. A prompt that one replica after the other dies of is given up."""
        if self.attempts == ATTEMPTS:
            self.cancel()
            raise Unavailable(f"{ATTEMPTS} replicas have failed or died with this request") from error
        if self.replicas is not None:
            self.replicas.resent += 1
        log.warning("a replica has died or failed (%s); a request is sent again", type(error).__name__)
        await asyncio.sleep(PAUSE)

    async def _next(self) -> Any:
        try:
            with fail_after(max(0.0, self.deadline - time.monotonic())):
                item = await anext(self.replies)
        except TimeoutError as error:
            raise TimedOut("the answer took longer than this server allows; ask for fewer tokens") from error
        except BackPressureError as error:
            raise Full("as many requests wait as this server takes; try again") from error
        except RayTaskError as error:
            if isinstance(error.cause, DEATHS):
                raise error.cause from error
            raise
        if isinstance(item, ServingError):
            raise item
        return item


@dataclass(frozen=True)
class Snapshot:
    running: int
    resent: int


class Replicas:
    """The backend of the ingress. At most `max_requests` prompts are on their way at once."""

    accepting = alive = True  # what becomes of replicas is Serve's concern

    def __init__(self, handle: Any, max_requests: int):
        self.handle, self.max_requests = handle.options(stream=True), max_requests
        self.held = self.resent = 0

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(self.held, self.resent)

    async def submit(
        self, prompt: Any, sampling: Sampling, *, budget: float | None, whole: bool, timeout: float
    ) -> RemoteJob:
        if self.held >= self.max_requests:
            raise Full(f"{self.held} requests are being answered, which is all this server takes; try again")
        job = RemoteJob(self, (prompt, sampling, budget, whole), timeout)
        try:
            return await job.connect()
        except BaseException:
            job.cancel()
            raise


def application(
    spec: EngineSpec,
    settings: ServerSettings,
    *,
    replicas: int = 1,
    autoscale: tuple[int, int] | None = None,
    grace: float = 30.0,
    actor_options: dict[str, Any] | None = None,
) -> serve.Application:
    """What `serve.run` takes.

    replicas       how many; or autoscale, the least and the most, by the requests that they work on
    actor_options  of each replica, for Ray: num_cpus, num_gpus ...
    """
    many = autoscale[1] if autoscale else replicas
    scaling = {"num_replicas": replicas}
    if autoscale:
        low, high = autoscale
        scaling = {
            "autoscaling_config": {
                "min_replicas": low,
                "max_replicas": high,
                "target_ongoing_requests": spec.max_batch,
            }
        }
    model = serve.deployment(
        Model,
        name=MODEL,
        ray_actor_options=actor_options or {},
        max_ongoing_requests=spec.max_requests,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=grace,
        **scaling,
    ).bind(spec)

    def ingress_app() -> Any:
        from drllm_fast.serving.app import create_app

        handle = serve.get_deployment_handle(MODEL, app_name=APP)
        return create_app(Replicas(handle, many * spec.max_requests), settings)

    ingress = serve.deployment(
        serve.ingress(ingress_app)(),
        name="Ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=many * spec.max_requests + 100,  # with room to say that there is none, and for /health
        graceful_shutdown_timeout_s=grace,
    )
    return ingress.bind(model)
