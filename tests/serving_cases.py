"""For tests of the server: a tiny model behind a real one on a free port, and an engine whose steps can be held up."""

import contextlib
import json
import threading
import time

import httpx
from cli_cases import TEMPLATE, byte_tokenizer
from families import LAYERS, tiny

from drllm_fast.generation import Engine, Sampling
from drllm_fast.serving.server import Server, listen
from drllm_fast.serving.settings import ServerSettings
from drllm_fast.serving.worker import Worker

NAME = "tiny"


def tiny_llama(**changes):
    """With 258 tokens, 2048 positions and no end of sequence, so that answers are as long as was asked."""
    return tiny("llama", vocab_size=258, max_position_embeddings=2048, pad_token_id=1, bos_token_id=None, **changes)


class HeldEngine(Engine):
    """Steps only while `open` is set, after `pause` seconds. The next forward raises `failing`."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.open = threading.Event()
        self.open.set()
        self.pause, self.failing = 0.0, None

    def step(self):
        self.open.wait(30)
        time.sleep(self.pause)
        return super().step()

    def _read(self, group):
        self._fail()
        return super()._read(group)

    def _decode(self):
        self._fail()
        return super()._decode()

    def _fail(self):
        failing, self.failing = self.failing, None
        if failing is not None:
            raise failing


class Served:
    """A server that runs in a thread of its own."""

    def __init__(self, engine, settings, grace=10.0, **worker):
        self.engine, self.settings = engine, settings
        self.worker = Worker(engine, max_prompt_tokens=settings.max_prompt_tokens, **worker).start()
        self.socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = Server(self.worker, settings, grace, log_level="warning")
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=30)
        self.wait(lambda: self.server.started)

    def stop(self):
        self.engine.open.set()
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()
        assert self.worker.held == 0 and self.engine.pool.used == 0 and not self.engine.busy

    @staticmethod
    def wait(condition, seconds=10):
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "it did not come about"
            time.sleep(0.005)

    def idle(self):
        """Nothing is left: no row, no span of the pool, no place taken."""
        snapshot = self.worker.snapshot
        return self.worker.held == 0 and (snapshot.waiting, snapshot.running, snapshot.pool_used) == (0, 0, 0)

    def complete(self, prompt="Hello", path="/v1/completions", headers=None, **body):
        return self.client.post(path, json={"model": NAME, "prompt": prompt, "temperature": 0, **body}, headers=headers)

    def chat(self, text="Hello", **body):
        messages = [{"role": "user", "content": text}]
        return self.client.post(
            "/v1/chat/completions", json={"model": NAME, "messages": messages, "temperature": 0, **body}
        )

    def metric(self, name):
        lines = self.client.get("/metrics").text.splitlines()
        found = [line.rpartition(" ")[2] for line in lines if line.startswith(f"drllm_fast_{name} ")]
        return float(found[0])


@contextlib.contextmanager
def served(model=None, *, grace=10.0, engine=None, worker=None, **settings):
    """A server of the model, with the options of `ServerSettings`."""
    tokenizer = byte_tokenizer(TEMPLATE)
    held = HeldEngine(model or tiny_llama(), tokenizer, **{"kv_tokens": 100_000, **(engine or {})})
    server = Served(held, ServerSettings(model=NAME, **settings), grace, **(worker or {}))
    try:
        yield server
    finally:
        server.stop()


def events(text):
    """Of a stream: its objects. The last event must be [DONE]."""
    blocks = text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    assert all(block.startswith("data: ") for block in blocks[:-1])
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def sampling(**changes):
    return Sampling(**{"max_new_tokens": 256, **changes})


__all__ = ["LAYERS", "NAME", "HeldEngine", "Served", "events", "sampling", "served", "tiny_llama"]
