"""The server at its limits: full, late, left by its clients, with an engine that fails, and at its end."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytest.importorskip("fastapi")

import torch
from serving_cases import NAME, events, served, tiny_llama

from drllm_fast import StaticPolicy

BODY = {"model": NAME, "prompt": "Hello", "temperature": 0}


def in_background(server, **body):
    """A request in a thread; its response."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(httpx.post, f"{server.url}/v1/completions", json={**BODY, **body}, timeout=30)
    pool.shutdown(wait=False)
    return future


def statuses(server):
    lines = server.client.get("/metrics").text.splitlines()
    found = (line for line in lines if line.startswith('drllm_fast_requests_total{endpoint="/v1/completions"'))
    return {line.partition('status="')[2][:3]: float(line.rpartition(" ")[2]) for line in found}


# -- full and late -----------------------------------------------------------------------------------------------------
def test_a_full_server_says_so():
    with served(worker={"max_requests": 3}, engine={"max_batch": 2, "lookahead": 0}) as server:
        server.engine.open.clear()
        running = [in_background(server, max_tokens=5) for _ in range(3)]
        server.wait(lambda: server.worker.held == 3)
        for stream in (False, True):
            response = server.complete(stream=stream)
            assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["type"] == "rate_limit_error"
        server.engine.open.set()
        assert [r.result().status_code for r in running] == [200] * 3
        server.wait(server.idle)
        assert server.complete(max_tokens=5).status_code == 200  # there is room again
        assert statuses(server) == {"200": 4, "429": 2}


def test_a_request_that_takes_too_long():
    with served(timeout=0.6) as server:
        server.complete(max_tokens=2)  # warm
        server.engine.open.clear()
        before = time.monotonic()
        response = server.complete(max_tokens=1000)
        assert 0.5 < time.monotonic() - before < 5
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        server.engine.open.set()
        server.wait(server.idle)

        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={**BODY, "max_tokens": 900, "stream": True}
        ) as s:
            lines = s.iter_lines()
            first = next(lines)
            server.engine.open.clear()
            rest = [line for line in lines if line]
            assert s.status_code == 200
        chunks = events("\n\n".join([first, *rest, ""]))
        assert chunks[-1]["error"]["code"] == "timeout" and len(chunks) < 900
        server.engine.open.set()
        server.wait(server.idle)
        assert statuses(server) == {"200": 1, "504": 2}


def test_a_body_that_does_not_arrive():
    import socket

    with served(timeout=0.3) as server:
        with socket.create_connection(("127.0.0.1", server.socket.getsockname()[1]), timeout=10) as raw:
            raw.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"model"')
            assert raw.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert server.idle()


def test_a_client_that_leaves_while_it_sends(caplog):
    import socket

    with served() as server:
        with socket.create_connection(("127.0.0.1", server.socket.getsockname()[1]), timeout=10) as raw:
            raw.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"model"')
        server.wait(lambda: statuses(server) == {"499": 1})
        assert server.idle() and not [record for record in caplog.records if record.levelname == "ERROR"]


# -- clients that leave ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["waiting", "running"])
def test_a_client_that_leaves(stream, when):
    """Its row goes at once, wherever it is, and the others stay."""
    with served(engine={"max_batch": 1, "lookahead": 0}) as server:
        server.engine.pause = 0.005
        first = None
        if when == "waiting":
            first = in_background(server, max_tokens=200)
            server.wait(lambda: server.worker.snapshot.running == 1)
        client = httpx.Client()
        gone = threading.Event()

        def leave():
            body = {**BODY, "prompt": "Bye", "max_tokens": 1000, "stream": stream}
            try:
                with client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
                    for _ in response.iter_raw():
                        pass
            except httpx.HTTPError:
                gone.set()

        thread = threading.Thread(target=leave)
        thread.start()
        held = 2 if when == "waiting" else 1
        server.wait(lambda: server.worker.held == held)
        if when == "running":
            server.wait(lambda: server.worker.snapshot.running == 1)
        (sock,) = [c._network_stream.get_extra_info("socket") for c in _connections(client)]
        sock.shutdown(2)
        thread.join(10)
        assert gone.is_set()
        server.wait(lambda: server.worker.held == held - 1)
        if first is not None:
            assert first.result().json()["usage"]["completion_tokens"] == 200
        server.wait(server.idle)
        assert server.engine.stats.tokens < 1000
        server.wait(lambda: statuses(server).get("499") == 1)


def _connections(client):
    return [c._connection for c in client._transport._pool.connections]


def test_a_client_that_does_not_read():
    with served(timeout=1.0) as server:
        import socket

        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        raw.connect(("127.0.0.1", server.socket.getsockname()[1]))
        body = b'{"model": "tiny", "prompt": "Hello", "max_tokens": 1000, "stream": true}'
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        server.wait(lambda: server.engine.stats.tokens > 0)
        server.wait(server.idle)
        raw.close()


# -- an engine that fails ----------------------------------------------------------------------------------------------
def test_a_forward_that_fails_fails_its_requests_alone():
    with served(engine={"max_batch": 2, "lookahead": 0}) as server:
        server.engine.open.clear()
        batch = [in_background(server, max_tokens=30), in_background(server, max_tokens=30, stream=True)]
        server.wait(lambda: server.worker.held == 2)
        server.engine.open.set()
        server.wait(lambda: server.worker.snapshot.running == 2)
        server.engine.open.clear()
        waits = in_background(server, max_tokens=5)
        server.wait(lambda: server.worker.held == 3)
        server.engine.failing = RuntimeError("secret details")
        server.engine.open.set()
        plain, stream = (future.result() for future in batch)
        assert plain.status_code == 500 and "secret" not in plain.text
        assert plain.json()["error"]["code"] == "engine_failed"
        assert events(stream.text)[-1]["error"]["code"] == "engine_failed"
        assert waits.result().status_code == 200
        assert server.client.get("/health").status_code == 200
        server.wait(server.idle)
        assert statuses(server) == {"200": 1, "500": 2}


def test_a_result_that_a_failure_swallows_is_not_waited_for(monkeypatch):
    """Two rows of a step: the first ends, then the second raises."""
    with served(engine={"max_batch": 2, "lookahead": 0}) as server:
        take = server.engine._take

        def failing(request, token):
            if len(request.tokens) == 4 and request is server.engine.schedule.running[-1]:
                raise RuntimeError("boom")
            return take(request, token)

        server.engine.open.clear()
        both = [in_background(server, max_tokens=n) for n in (5, 50)]
        server.wait(lambda: server.worker.held == 2)
        monkeypatch.setattr(server.engine, "_take", failing)
        server.engine.open.set()
        assert [future.result().status_code for future in both] == [500, 500]
        server.wait(server.idle)


def test_defects_are_answered_and_survived(monkeypatch):
    with served() as server:
        for at, name in ((server.engine, "submit"), (server.worker, "_encode")):
            with monkeypatch.context() as patch:
                patch.setattr(at, name, lambda *_, **__: 1 / 0)
                for stream in (False, True):
                    response = server.complete(stream=stream)
                    assert response.status_code == 500 and "ZeroDivisionError" in response.json()["error"]["message"]
            server.wait(server.idle)
        assert server.complete(max_tokens=2).status_code == 200
        assert statuses(server) == {"200": 1, "500": 4}


def test_a_model_that_says_nan_fails_nobody_else():
    model = tiny_llama()
    with served(model) as server:
        head = model.lm_head.forward
        model.lm_head.forward = lambda hidden: head(hidden) * float("nan")
        answers = [in_background(server, max_tokens=4, temperature=t) for t in (0, 1)]
        assert [a.result().status_code for a in answers] == [200, 200]
        model.lm_head.forward = head
        assert server.complete(max_tokens=4).status_code == 200


@pytest.mark.parametrize("error", [torch.AcceleratorError("the device is lost"), SystemExit(3)], ids=["device", "exit"])
def test_an_engine_that_is_lost(error):
    with served() as server:
        server.complete(max_tokens=2)
        server.engine.open.clear()
        running = in_background(server, max_tokens=30)
        server.wait(lambda: server.worker.held == 1)
        server.engine.failing = error
        server.engine.open.set()
        assert running.result().status_code == 503
        server.wait(lambda: not server.worker.alive)
        assert server.client.get("/health").status_code == 503
        assert server.client.get("/health").json() == {"status": "engine failed"}
        response = server.complete()
        assert response.status_code == 503 and "engine has failed" in response.text
        assert server.worker.held == 0


# -- the end -----------------------------------------------------------------------------------------------------------
def test_a_shutdown_waits_for_what_runs():
    with served() as server:
        server.engine.open.clear()
        running = [in_background(server, max_tokens=20, stream=stream) for stream in (False, True)]
        server.wait(lambda: server.worker.held == 2)
        server.server.should_exit = True
        server.wait(lambda: not server.worker.accepting)
        response = server.complete()
        assert response.status_code == 503 and "shutting down" in response.text
        assert server.client.get("/health").json() == {"status": "shutting down"}
        server.engine.open.set()
        plain, stream = (future.result() for future in running)
        assert plain.json()["usage"]["completion_tokens"] == 20
        assert events(stream.text)[-1]["choices"][0]["finish_reason"] == "length"
        server.thread.join(20)
        assert not server.thread.is_alive() and not server.worker.alive


def test_a_shutdown_does_not_wait_for_ever():
    with served(grace=0.3) as server:
        running = [in_background(server, max_tokens=1024, stream=stream) for stream in (False, True)]
        server.wait(lambda: server.worker.snapshot.running == 2)
        server.engine.pause = 0.05
        server.server.should_exit = True
        plain, stream = (future.result() for future in running)
        assert plain.status_code == 503
        assert events(stream.text)[-1]["error"]["code"] == "unavailable"
        server.thread.join(20)
        assert not server.thread.is_alive()


# -- all at once -------------------------------------------------------------------------------------------------------
def test_sixteen_clients():
    """Each does everything that a client may do; answers are those of a lone client, and nothing is left."""
    model = tiny_llama()
    model.enable_dynamic_routing(StaticPolicy([1, 2, 0], num_layers=4, budget=0.75))
    with served(model, engine={"max_batch": 6, "lookahead": 4, "kv_tokens": 6000}) as server:
        kinds = [
            {
                "prompt": prompt,
                "max_tokens": tokens,
                "budget": budget,
                "temperature": temperature,
                "seed": 3,
                "top_k": 4,
            }
            for prompt, tokens in (("Hi", 9), ("A longer prompt", 30), ("x" * 100, 17))
            for budget in (1, 0.5)
            for temperature in (0, 0.9)
        ]
        alone = [server.complete(**kind).json()["choices"][0]["text"] for kind in kinds]
        assert len(set(alone)) == len(kinds)
        until = time.monotonic() + 4
        counts = {}

        def client(number):
            with httpx.Client(base_url=server.url, timeout=30) as http:
                turn = number
                while time.monotonic() < until:
                    turn += 1
                    kind, right = kinds[turn % len(kinds)], alone[turn % len(kinds)]
                    body = {**BODY, **kind}
                    if turn % 5 == 0:
                        assert http.post("/v1/completions", json={**body, "budget": -1}).status_code == 400
                        did = "rubbish"
                    elif turn % 5 == 1:
                        stream = {**body, "stream": True, "max_tokens": 300}
                        with http.stream("POST", "/v1/completions", json=stream) as response:
                            next(response.iter_lines())
                        did = "left"
                    elif turn % 5 == 2:
                        text = http.post("/v1/completions", json={**body, "stream": True}).text
                        assert "".join(e["choices"][0]["text"] for e in events(text)) == right
                        did = "streamed"
                    else:
                        answer = http.post("/v1/completions", json=body).json()
                        assert answer["choices"][0]["text"] == right
                        did = "whole"
                    counts[number, did] = counts.get((number, did), 0) + 1

        with ThreadPoolExecutor(16) as pool:
            for future in [pool.submit(client, number) for number in range(16)]:
                future.result()
        server.wait(server.idle)
        assert {did for _, did in counts} == {"rubbish", "left", "streamed", "whole"}
        assert len({number for number, _ in counts}) == 16
        assert server.engine.pool.used == 0 and server.engine.stats.peak_rows > 6
