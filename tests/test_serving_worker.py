"""The worker without HTTP: what the engine's thread and event loops do to each other."""

import asyncio
import threading
import time

import pytest

pytest.importorskip("fastapi")

from cli_cases import TEMPLATE, byte_tokenizer
from serving_cases import HeldEngine, sampling, tiny_llama

import drllm_fast
from drllm_fast.serving.errors import BadRequest, Full, TimedOut, Unavailable
from drllm_fast.serving.worker import Worker


@pytest.fixture
def worker():
    engine = HeldEngine(tiny_llama(), byte_tokenizer(TEMPLATE), kv_tokens=6000)
    worker = Worker(engine, max_requests=40, max_prompt_tokens=100).start()
    yield worker
    engine.open.set()
    worker.close()
    assert worker.held == 0 and engine.pool.used == 0 and not worker.alive


async def answer(worker, prompt="Hello", whole=False, timeout=20, **changes):
    job = await worker.submit(prompt, sampling(**changes), whole=whole, timeout=timeout)
    return [delta async for delta in job.deltas()]


async def idle(worker):
    for _ in range(2000):
        if not (worker.held or worker.snapshot.pool_used or worker.snapshot.waiting):
            return
        await asyncio.sleep(0.005)
    raise AssertionError("something is left")


def test_deltas(worker):
    (want,) = drllm_fast.generate(tiny_llama(), byte_tokenizer(), ["Hello"], max_new_tokens=12)
    deltas = asyncio.run(answer(worker, max_new_tokens=12))
    assert [token for delta in deltas for token in delta.tokens] == want.tokens
    assert "".join(delta.text for delta in deltas) == want.text == deltas[-1].result.text
    (only,) = asyncio.run(answer(worker, whole=True, max_new_tokens=12))
    assert only.result.text == want.text


def test_several_event_loops_at_once(worker):
    """Each hears of its own jobs alone."""
    texts = {}

    def run(number):
        async def many():
            return await asyncio.gather(*(answer(worker, "x" * (number + 1), max_new_tokens=8) for _ in range(4)))

        texts[number] = {deltas[-1].result.text for deltas in asyncio.run(many())}

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    want = drllm_fast.generate(
        tiny_llama(), byte_tokenizer(), ["x" * (n + 1) for n in range(6)], max_new_tokens=8, max_batch=1, lookahead=0
    )
    assert [texts[n] for n in range(6)] == [{w.text} for w in want]


def test_a_loop_that_ends_early_harms_nobody(worker):
    async def leave():
        worker.engine.open.clear()
        await worker.submit("Hello", sampling(max_new_tokens=50))  # and nobody listens

    asyncio.run(leave())
    worker.engine.open.set()
    (only,) = asyncio.run(answer(worker, whole=True, max_new_tokens=3))
    assert only.result.finish_reason == "length"
    asyncio.run(idle(worker))


def test_whoever_stops_listening_cancels(worker):
    async def first_only():
        job = await worker.submit("Hello", sampling(max_new_tokens=250))
        deltas = job.deltas()
        await anext(deltas)
        await deltas.aclose()
        await idle(worker)
        job.cancel()  # once more does nothing
        await idle(worker)

    asyncio.run(first_only())
    assert worker.engine.stats.tokens < 250


def test_cancelled_in_any_state(worker):
    """Tasks that are cancelled after every possible number of turns of the event loop."""

    async def all_of_them():
        worker.engine.pause = 0.001
        for turns in range(30):
            task = asyncio.ensure_future(answer(worker, max_new_tokens=200))
            for _ in range(turns):
                await asyncio.sleep(0)
            await asyncio.sleep(0.001 * (turns % 4))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await idle(worker)

    asyncio.run(all_of_them())
    assert worker.engine.stats.tokens < 30 * 200


def test_tokenising_does_not_hold_up_the_loop_and_counts_against_time(worker):
    slow = threading.Event()
    encode = worker._encode

    def encoding(prompt):
        slow.wait(5)
        return encode(prompt)

    worker._encode = encoding

    async def late():
        before = time.monotonic()
        with pytest.raises(TimedOut):
            await answer(worker, timeout=0.2)
        assert time.monotonic() - before < 2 and worker.held == 0
        slow.set()

    asyncio.run(late())


def test_refusals_take_no_place(worker):
    for prompt, word in (("", "no token"), ("x" * 101, "at most 100"), ([300], "0 to 257"), (3, "int"), ([{}], "role")):
        with pytest.raises(BadRequest, match=word):
            asyncio.run(answer(worker, prompt))
    with pytest.raises(BadRequest, match="places for keys and values"):
        asyncio.run(answer(worker, [5] * 100, max_new_tokens=8000))
    assert worker.held == 0


def test_full(worker):
    async def crowd():
        worker.engine.open.clear()
        worker.call(lambda: None)
        tasks = [asyncio.ensure_future(answer(worker, max_new_tokens=3)) for _ in range(40)]
        while worker.held < 40:
            await asyncio.sleep(0)
        with pytest.raises(Full, match="40 requests"):
            await answer(worker)
        worker.engine.open.set()
        await asyncio.gather(*tasks)
        await answer(worker, max_new_tokens=3)

    asyncio.run(crowd())


def test_closed_while_jobs_run(worker):
    async def closing():
        job = await worker.submit("Hello", sampling(max_new_tokens=250))
        worker.engine.pause = 0.01
        await asyncio.get_running_loop().run_in_executor(None, worker.close)
        with pytest.raises(Unavailable, match="shutting down"):
            async for _ in job.deltas():
                pass
        with pytest.raises(Unavailable, match="shutting down"):
            await answer(worker)
        job.cancel()

    asyncio.run(closing())


def test_a_model_that_cannot_be_served_says_so_at_once():
    engine = HeldEngine(tiny_llama(), byte_tokenizer(), kv_tokens=1000)
    with engine, pytest.raises(RuntimeError, match="running already"):
        Worker(engine).start()
    with pytest.raises(ValueError, match="max_requests must be at least 1, got 0"):
        Worker(engine, max_requests=0)
