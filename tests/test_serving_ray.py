"""The server under Ray Serve: two replicas on this machine, of which one is killed."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("ray.serve")

import psutil
import ray
from cli_cases import TEMPLATE, byte_tokenizer, tiny_folder
from ray import serve
from serving_cases import events, sampling
from transformers import AutoModelForCausalLM

import drllm_fast
from drllm_fast.serving.ray_serve import APP, application
from drllm_fast.serving.server import listen
from drllm_fast.serving.settings import ServerSettings
from drllm_fast.serving.start import EngineSpec

NEW = 900
# Few tokens to draw from: among many, the rounding of a sum, which depends on the batch, turns a draw now and then.
DRAWN = {"temperature": 0.7, "seed": 5, "top_k": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"), template=TEMPLATE)


@pytest.fixture(scope="module")
def url(folder):
    with listen("127.0.0.1", 0) as socket:
        port = socket.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    spec = EngineSpec(str(folder), policy="skip:1", device="cpu", max_requests=20, kv_tokens=100_000, max_batch=2)
    settings = ServerSettings(model="tiny", timeout=60)
    serve.run(application(spec, settings, replicas=2, grace=5, actor_options={"num_cpus": 0}), name=APP)
    yield f"http://127.0.0.1:{port}"
    ray.shutdown()


def replicas():
    def is_one(process):
        try:
            return process.is_running() and any(f"ServeReplica:{APP}:Model" in part for part in process.cmdline())
        except psutil.Error:  # it has ended meanwhile
            return False

    return [process for process in psutil.Process().children(recursive=True) if is_one(process)]


def states():
    """By process, of each replica that there is."""
    handle = serve.get_deployment_handle("Model", app_name=APP)
    found, until = {}, time.monotonic() + 40
    while len(found) < len(replicas()):  # calls go to whom Serve likes
        assert time.monotonic() < until
        calls = [handle.state.remote() for _ in range(8)]
        found |= {state["process"]: state for state in (call.result() for call in calls)}
    return found


def wanted(folder, prompts, new):
    model = AutoModelForCausalLM.from_pretrained(folder).eval().enable_dynamic_routing([1, 0, 1, 1])
    made = drllm_fast.generate(
        model,
        byte_tokenizer(),
        prompts,
        sampling=sampling(max_new_tokens=new, **DRAWN),
    )
    return [m.text for m in made]


def body(prompt, new, **more):
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": new,
        **DRAWN,
        **more,
    }


def resent(url):
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("drllm_fast_resent "))


def test_answers_and_refusals(url, folder):
    (want,) = wanted(folder, ["Hello"], 20)
    answer = httpx.post(f"{url}/v1/completions", json=body("Hello", 20), timeout=60).json()
    assert answer["choices"][0]["text"] == want and answer["usage"]["path"] == [1, 0, 1, 1]
    stream = httpx.post(f"{url}/v1/completions", json=body("Hello", 20, stream=True), timeout=60)
    assert "".join(event["choices"][0]["text"] for event in events(stream.text)) == want
    for more, status in (({"budget": 0.5}, 400), ({"nothing": 1}, 400), ({"model": "other"}, 404)):
        refused = httpx.post(f"{url}/v1/completions", json=body("Hello", 20, **more))
        assert refused.status_code == status and refused.json()["error"]["message"]
    assert httpx.post(f"{url}/v1/completions", content=b"x" * 1_000_000).status_code == 413
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert len(replicas()) == 2


def test_accepted_requests_survive_the_death_of_a_replica(url, folder):
    prompts = ["x" * (n + 1) for n in range(8)]
    want = wanted(folder, prompts, NEW)
    before = replicas()
    assert len(before) == 2

    def ask(prompt):
        return httpx.post(f"{url}/v1/completions", json=body(prompt, NEW), timeout=60)

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, prompt) for prompt in prompts]
        at_work = {}
        while not any(at_work.values()):  # Serve may give all of them to one
            at_work = {process: state["requests"] for process, state in states().items()}
            assert not all(answer.done() for answer in answers)
        os.kill(max(at_work, key=at_work.get), signal.SIGKILL)
        answers = [answer.result() for answer in answers]
    assert [answer.status_code for answer in answers] == [200] * 8, [a.text for a in answers]
    assert [answer.json()["choices"][0]["text"] for answer in answers] == want
    assert resent(url) >= 1
    until = time.monotonic() + 40
    while len(replicas()) < 2:  # another one takes its place
        assert time.monotonic() < until
        time.sleep(0.2)
    assert {p.pid for p in before} != {p.pid for p in replicas()}


def test_a_client_that_leaves_frees_its_place(url):
    before = states()
    assert not any(state["requests"] for state in before.values())
    with httpx.stream("POST", f"{url}/v1/completions", json=body("Hello", 1000, stream=True), timeout=60) as response:
        next(response.iter_lines())
    until = time.monotonic() + 30
    now = states()
    while any(state["requests"] or state["pool_used"] for state in now.values()):
        assert time.monotonic() < until
        now = states()
    while "drllm_fast_running 0.0" not in httpx.get(f"{url}/metrics").text:
        assert time.monotonic() < until
    made = {process: now[process]["tokens"] - before.get(process, {"tokens": 0})["tokens"] for process in now}
    assert 0 < sum(made.values()) < 1000, made
