"""The server as clients see it: real HTTP, a tiny model, answers beside those of `drllm_fast.generate`."""

import json
import re
import socket
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi")

from cli_cases import TEMPLATE, byte_tokenizer
from serving_cases import LAYERS, NAME, events, sampling, served, tiny_llama

import drllm_fast
from drllm_fast import StaticPolicy

PROMPTS = ["Hello", "What is it?", "A somewhat longer prompt, which is about nothing"]
ENDPOINTS = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def policy():
    return StaticPolicy([1, 2, 0], num_layers=LAYERS, budget=0.75)


@pytest.fixture(scope="module")
def server(policy):
    model = tiny_llama()
    model.enable_dynamic_routing(policy)
    with served(model, max_tokens=500, max_body_bytes=20_000, max_prompt_tokens=600, timeout=20) as server:
        yield server
        server.wait(server.idle)


def expected(policy, prompts, budget=None, **changes):
    model = tiny_llama()
    model.enable_dynamic_routing(policy)
    return drllm_fast.generate(
        model, byte_tokenizer(TEMPLATE), prompts, sampling=sampling(**changes), budgets=budget, max_batch=1, lookahead=0
    )


def refused(response, status, *words):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert all(word in error["message"] for word in words), error
    return error


# -- answers -----------------------------------------------------------------------------------------------------------
def test_completions_are_those_of_generate(server, policy):
    want = expected(policy, PROMPTS, max_new_tokens=24)
    assert len({w.text for w in want}) == 3
    for prompt, w in zip(PROMPTS, want, strict=True):
        body = server.complete(prompt, max_tokens=24).json()
        assert (body["object"], body["model"]) == ("text_completion", NAME)
        (choice,) = body["choices"]
        assert (choice["text"], choice["finish_reason"], choice["index"]) == (w.text, "length", 0)
        n = len(prompt)
        assert body["usage"] == {
            "prompt_tokens": n,
            "completion_tokens": 24,
            "total_tokens": n + 24,
            "layers_run": 3,
            "layers_dense": 4,
            "path": [1, 0, 1, 1],
        }
    ids = byte_tokenizer()(PROMPTS[0])["input_ids"]
    assert server.complete(ids, max_tokens=24).json()["choices"][0]["text"] == want[0].text


def test_chats_are_those_of_generate(server, policy):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    (want,) = expected(policy, [messages], max_new_tokens=24)
    body = server.client.post(
        "/v1/chat/completions", json={"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 24}
    ).json()
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": want.text} and body["object"] == "chat.completion"
    assert body["usage"]["prompt_tokens"] == want.prompt_tokens == len("<u>Be brief.<u>Hello<a>")


@pytest.mark.parametrize("usage", [False, True])
def test_streams_join_to_the_same_text(server, usage):
    options = {"stream": True, "max_tokens": 40, **({"stream_options": {"include_usage": True}} if usage else {})}
    whole = server.complete(max_tokens=40).json()
    response = server.complete(**options)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    if usage:
        last = chunks.pop()
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert not any("usage" in chunk for chunk in chunks)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) > 10 and len({chunk["id"] for chunk in chunks}) == 1

    whole = server.chat(max_tokens=40).json()["choices"][0]["message"]["content"]
    chunks = events(server.chat(**options).text)[: -1 if usage else None]
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole


def test_stop(server):
    whole = server.complete(max_tokens=60).json()["choices"][0]["text"]
    stop = whole[20:22]
    for given in (stop, ["not in there", stop]):
        body = server.complete(max_tokens=60, stop=given).json()
        choice = body["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
        assert body["usage"]["completion_tokens"] < 60
        chunks = events(server.complete(max_tokens=60, stop=given, stream=True).text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_end_of_a_sequence_and_going_on_after_it(policy):
    model = tiny_llama()
    third = expected(policy, PROMPTS[:1], max_new_tokens=3)[0].tokens[2]
    model.enable_dynamic_routing(policy)
    model.generation_config.eos_token_id = third
    with served(model) as server:
        body = server.complete(max_tokens=10).json()
        assert body["choices"][0]["finish_reason"] == "stop" and body["usage"]["completion_tokens"] == 2
        body = server.complete(max_tokens=10, ignore_eos=True).json()
        assert body["choices"][0]["finish_reason"] == "length" and body["usage"]["completion_tokens"] == 10


def test_seeds(server, policy):
    def text(**fields):
        return server.complete(max_tokens=24, **fields).json()["choices"][0]["text"]

    (want,) = expected(policy, PROMPTS[:1], max_new_tokens=24, temperature=1.0, seed=7)
    assert text(temperature=None, seed=7) == want.text  # OpenAI's temperature
    assert text(temperature=1, seed=8) != want.text
    assert text(temperature=1) != text(temperature=1)
    (want,) = expected(policy, PROMPTS[:1], max_new_tokens=24, temperature=0.8, seed=7, top_k=5, top_p=0.7)
    assert text(temperature=0.8, seed=7, top_k=5, top_p=0.7) == want.text


def test_numbers_at_their_edges(server):
    """What would be 0 or infinite in the arithmetic of the engine, and would fail those beside it."""
    greedy = server.complete(max_tokens=12).json()["choices"][0]["text"]
    for low in (1e-300, 1e-40, 1e-31):
        assert server.complete(max_tokens=12, temperature=low).json()["choices"][0]["text"] == greedy
    assert server.complete(max_tokens=12, temperature=1, top_p=1e-300).json()["choices"][0]["text"] == greedy
    for fields in ({"temperature": 1e308}, {"temperature": 1, "top_k": 10**30}, {"temperature": 1, "top_k": 258}):
        usage = server.complete(max_tokens=12, ignore_eos=True, **fields).json()["usage"]
        assert usage["completion_tokens"] == 12
    drawn = [
        server.complete(max_tokens=12, temperature=1, **{"seed": 5, **fields}).json()["choices"][0]["text"]
        for fields in ({}, {"top_k": 10**30}, {"top_k": 258}, {"seed": 5 + 2**63})
    ]
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3]


def test_budgets(server, policy):
    for budget, path in ((1, [1, 1, 1, 1]), (0.5, [1, 0, 0, 1]), (0.25, [0, 0, 0, 1])):
        (want,) = expected(policy, PROMPTS[:1], budget=budget, max_new_tokens=12)
        body = server.complete(max_tokens=12, budget=budget).json()
        assert body["choices"][0]["text"] == want.text
        assert (body["usage"]["path"], body["usage"]["layers_run"]) == (path, sum(path))
    refused(server.complete(budget=0.01), 400, "0.01", "leaves none")
    refused(server.complete(budget=1.5), 400, "1.5")


def test_a_model_without_budgets_or_templates():
    model = tiny_llama()
    with served(model) as server:
        assert server.complete(max_tokens=3).json()["usage"]["path"] == [1] * LAYERS
        refused(server.complete(budget=0.5), 400, "keeps no budget")
        server.worker._tokenizer.chat_template = None
        refused(server.chat(), 400, "no chat template")
        server.worker._tokenizer.chat_template = "{{ raise_exception('no system messages here') }}"
        refused(server.chat(), 400, "no system messages here")
        server.worker._tokenizer.chat_template = "{# nothing #}"
        refused(server.chat(), 400)
    assert not hasattr(model, "routing")  # left as it was


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\x00\x01\xff\xfe" * 200, b"[]", b'{"model": "tiny"}', b'"tiny"', b"[" * 15_000, b"a=1&b=2"],
    ids=lambda b: repr(b[:20]),
)
def test_rubbish(server, path, body):
    for kind in ("application/json", "application/x-www-form-urlencoded", "image/png"):
        assert refused(server.client.post(path, content=body, headers={"Content-Type": kind}), 400)["type"] == (
            "invalid_request_error"
        )


def test_wrong_requests(server):
    refused(server.complete(temperature="hot"), 400, "temperature", "'hot'")
    assert refused(server.complete(no_such_field=1), 400, "no_such_field")["param"] == "no_such_field"
    refused(server.complete(n=2), 400, "n is not supported")
    refused(server.complete(max_tokens=501), 400, "at most 500")
    refused(server.complete(budget=-1), 400, "budget")
    refused(server.complete(""), 400, "no token")
    refused(server.complete("a" * 601), 400, "601 tokens", "at most 600")
    refused(server.complete([0, 258]), 400, "0 to 257")
    refused(server.complete([-1]), 400, "0 to 257")
    refused(server.complete([10**30]), 400)
    refused(server.complete(model="gpt-5"), 404, "gpt-5", NAME)
    refused(server.client.get("/v1/completions"), 405)
    refused(server.client.delete("/v1/models"), 405)
    refused(server.client.post("/v1/embeddings", json={}), 404)
    refused(server.client.get("/"), 404)
    assert refused(server.complete(stream=True, model="gpt-5"), 404)  # before the stream begins
    assert server.complete(max_tokens=2).status_code == 200


def test_long_bodies_are_not_parsed(server, monkeypatch):
    from drllm_fast.serving import app

    monkeypatch.setattr(app, "parse", lambda *_: pytest.fail("parsed"))
    for size in (20_001, 1_000_000):
        refused(server.client.post("/v1/completions", content=b"[" * size), 413, "20000 bytes")
    parts = (b"[" * 50_000 for _ in range(20))  # chunked, its length is not announced
    refused(server.client.post("/v1/completions", content=parts), 413, "20000 bytes")
    # One without an end: so much is taken, then the connection is closed.
    monkeypatch.setattr(app, "DROPPED_BYTES", 100_000)
    endless = socket.create_connection(("127.0.0.1", server.socket.getsockname()[1]), timeout=10)
    endless.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000000\r\n\r\n" + b"[" * 110_000)
    assert endless.recv(100).startswith(b"HTTP/1.1 413 ")
    endless.close()


@pytest.mark.parametrize("limit", [50_000, 200_000])
def test_a_body_within_the_limit_is_read_whole(limit, monkeypatch):
    from drllm_fast.serving import app

    monkeypatch.setattr(app, "DROPPED_BYTES", 100_000)
    sent = 40_000 if limit < 100_000 else 190_000
    with served(max_body_bytes=limit) as server:
        said = refused(server.client.post("/v1/completions", content=b'{"colour":"' + b"x" * sent + b'"}'), 400)
        assert "JSON" not in said["message"], said


def test_raw_garbage_on_the_socket(server):
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20, b"GET\r\n\r\n", b"\xff" * 5000 + b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.socket.getsockname()[1]), timeout=10) as raw:
            raw.sendall(garbage)
            assert b" 400 " in raw.recv(1000)
    assert server.client.get("/health").json() == {"status": "ok"}


def test_api_key():
    with served(api_key="sésame") as server:
        for headers in (
            None,
            {"Authorization": "Bearer wrong"},
            {"Authorization": "sesame"},
            {"Authorization": "x" * 99},
        ):
            response = server.complete(headers=headers)
            assert refused(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer" and "same" not in response.text
            refused(server.client.get("/v1/models", headers=headers), 401)
        key = {"Authorization": "Bearer sésame".encode()}
        assert server.complete(headers=key, max_tokens=2).status_code == 200
        assert server.client.get("/v1/models", headers=key).json()["data"][0]["id"] == NAME
        assert server.client.get("/health").status_code == server.client.get("/metrics").status_code == 200


def test_the_readmes_example(server, capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```py\n(.*?)^```", readme, flags=re.M | re.S)
    assert "http://127.0.0.1:8000" in example and "smollm2-135m-instruct" in example
    example = example.replace("http://127.0.0.1:8000", server.url).replace("smollm2-135m-instruct", NAME)
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.endswith("\nlayers run of 4 for each token: 3\n")
    (body,) = re.findall(r"^curl http://127.0.0.1:8000(/\S+) -d '(.*?)'", readme, flags=re.M | re.S)
    fields = json.loads(body[1]) | {"model": NAME}
    assert server.client.post(body[0], json=fields).json()["usage"]["path"] == [1] * LAYERS


# -- what is around it -------------------------------------------------------------------------------------------------
def test_models_health_and_docs(server):
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == [NAME]
    assert server.client.get("/health").json() == {"status": "ok"}
    schema = server.client.get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert "budget" in json.dumps(schema) and "developer" in json.dumps(schema)
    assert "$ref" not in json.dumps(server.client.get("/openapi.json").json())


def test_metrics(server):
    def read():
        names = ("prompt_tokens", "completion_tokens", "layers_run", "layers_dense")
        return [server.metric(f"{name}_total") for name in names]

    def count(labels):
        try:
            return server.metric(f"requests_total{{{labels}}}")
        except IndexError:
            return 0

    ok, bad = ('endpoint="/v1/completions",status="200"', 'endpoint="/v1/completions",status="400"')
    before, counts, firsts = read(), (count(ok), count(bad)), server.metric(
        'time_to_first_token_seconds_count{endpoint="/v1/completions"}'
    )  # fmt: skip
    server.complete("12345", max_tokens=10)
    server.complete("12345", max_tokens=10, stream=True)
    server.complete(nothing=1)
    assert [now - b for b, now in zip(before, read(), strict=True)] == [10, 20, 3 * 30, 4 * 30]
    assert (count(ok) - counts[0], count(bad) - counts[1]) == (2, 1)
    for name in ("time_to_first_token", "request_latency"):
        assert server.metric(f'{name}_seconds_count{{endpoint="/v1/completions"}}') == firsts + 2
    total = server.metric('request_latency_seconds_sum{endpoint="/v1/completions"}')
    assert total > server.metric('time_to_first_token_seconds_sum{endpoint="/v1/completions"}') > 0
    server.client.get("/no/such/path")
    assert count('endpoint="other",status="404"') >= 1 and "/no/such" not in server.client.get("/metrics").text
    assert server.metric("pool_size") == 100_000


def test_gauges_while_it_works():
    with served(worker={"max_requests": 8}) as server, httpx.Client(base_url=server.url) as client:
        body = {"model": NAME, "prompt": "12345", "max_tokens": 100, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            for _ in range(3):
                next(lines)
            server.engine.open.clear()
            (row,) = server.engine.schedule.running
            server.wait(lambda: server.metric("kv_bytes") == LAYERS * row.held * 2 * 2 * 8 * 4)
            assert server.metric("running") == 1 and row.held >= 5
            assert server.metric("pool_used") == LAYERS * (5 + 100 - 1)
            server.engine.open.set()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        server.wait(server.idle)
        assert server.metric("running") == server.metric("pool_used") == server.metric("kv_bytes") == 0
