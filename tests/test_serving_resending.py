"""What the ingress under Ray Serve does about replicas that die, with replicas made up for it."""

import asyncio
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("ray.serve")

from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from drllm_fast.generation import Delta, Generation, Sampling
from drllm_fast.serving import ray_serve
from drllm_fast.serving.errors import BadRequest, EngineFailed, Full, TimedOut, Unavailable
from drllm_fast.serving.ray_serve import ATTEMPTS, Replicas

RESULT = Generation(0, "ab", [1, 2], (1, 1), 2, "length", 1, 0, 0.0, 0.0, 0.0)
FIRST, LAST = Delta(0, "a", [1]), Delta(0, "b", [2], RESULT)
WHOLE = [None, FIRST, LAST]


class Handle:
    """Replies in the order of the `scripts`: items that are yielded, exceptions that are raised, seconds to wait."""

    def __init__(self, *scripts):
        self.scripts, self.calls, self.cancelled = list(scripts), [], 0
        self.answer = self

    def options(self, stream):
        assert stream
        return self

    def remote(self, *arguments):
        self.calls.append(arguments)
        return Replies(self, self.scripts.pop(0))


class Replies:
    def __init__(self, handle, script):
        self.handle, self.script = handle, list(script)

    async def __anext__(self):
        item = self.script.pop(0)
        if isinstance(item, float):
            await asyncio.sleep(item)
            return await anext(self)
        if isinstance(item, Exception) and not isinstance(item, ray_serve.ServingError):
            raise item
        return item

    def cancel(self):
        self.handle.cancelled += 1


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ray_serve, "PAUSE", 0)


def died():
    return ActorDiedError()


def ask(handle, timeout=5.0, most=9):
    """The deltas, and the backend."""
    backend = Replicas(handle, most)

    async def run():
        job = await backend.submit("Hello", Sampling(seed=3), budget=0.5, whole=False, timeout=timeout)
        assert backend.held == 1
        return [delta async for delta in job.deltas()]

    try:
        return asyncio.run(run()), backend
    finally:
        assert backend.held == 0


def test_an_answer():
    handle = Handle(WHOLE)
    deltas, backend = ask(handle)
    assert deltas == [FIRST, LAST] and backend.resent == 0
    assert handle.calls[0][:4] == ("Hello", Sampling(seed=3), 0.5, False) and 4 < handle.calls[0][4] <= 5


@pytest.mark.parametrize("gone", [died(), Unavailable("the engine has failed")], ids=["died", "failed"])
@pytest.mark.parametrize("before", [[], [None]], ids=["not accepted", "accepted"])
def test_sent_again_as_long_as_nothing_has_gone_out(gone, before):
    handle = Handle([*before, gone], [*before, gone], WHOLE)
    deltas, backend = ask(handle)
    assert deltas == [FIRST, LAST] and backend.resent == 2
    assert [call[:4] for call in handle.calls] == [("Hello", Sampling(seed=3), 0.5, False)] * 3
    assert handle.cancelled >= 1


def test_not_sent_again_once_a_part_has_gone_out():
    handle = Handle([None, FIRST, died()], WHOLE)
    with pytest.raises(EngineFailed, match="send the request again"):
        ask(handle)
    assert len(handle.calls) == 1


@pytest.mark.parametrize("before", [[], [None]], ids=["not accepted", "accepted"])
def test_a_request_that_every_replica_dies_of(before):
    handle = Handle(*([*before, died()] for _ in range(ATTEMPTS + 1)))
    with pytest.raises(Unavailable, match=f"{ATTEMPTS} replicas"):
        ask(handle)
    assert len(handle.calls) == ATTEMPTS


def test_a_death_that_arrives_as_the_cause_of_a_task_error():
    wrapped = RayTaskError("answer", "", died())
    assert ask(Handle([wrapped], WHOLE))[0] == [FIRST, LAST]
    defect = RayTaskError("answer", "", ValueError("a defect"))
    with pytest.raises(RayTaskError):
        ask(Handle([None, defect]))


def test_refusals_are_passed_on():
    with pytest.raises(BadRequest, match="too long"):
        ask(Handle([BadRequest("too long")]))
    with pytest.raises(Full, match="wait"):
        ask(Handle([BackPressureError(num_queued_requests=3, max_queued_requests=2)]))
    with pytest.raises(EngineFailed, match="forward"):
        ask(Handle([None, FIRST, EngineFailed("forward")]))
    with pytest.raises(Full, match="0 requests"):
        ask(Handle(WHOLE), most=0)


@pytest.mark.parametrize("script", [[9.0], [None, 9.0], [None, FIRST, 9.0]])
def test_time_is_kept_here_too(script):
    begin = time.monotonic()
    handle = Handle(script)
    with pytest.raises(TimedOut):
        ask(handle, timeout=0.1)
    assert time.monotonic() - begin < 5 and handle.cancelled >= 1


def test_the_time_that_is_left_is_what_a_second_replica_gets():
    handle = Handle([None, 0.2, died()], WHOLE)
    ask(handle)
    assert handle.calls[1][4] < 4.85


def test_a_client_that_leaves():
    handle = Handle([None, FIRST, 9.0])
    backend = Replicas(handle, 1)

    async def leave():
        job = await backend.submit("Hello", Sampling(), budget=None, whole=False, timeout=5)
        task = asyncio.ensure_future(_all(job))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert handle.cancelled == 1 and backend.held == 0


async def _all(job):
    return [delta async for delta in job.deltas()]
