"""`drllm-fast serve`: what it refuses before a model is loaded, and the server as a process, up to its end."""

import re
import signal
import sys
import threading
import time

import pytest
from cli_cases import TEMPLATE, call, refused, start, tiny_folder

pytest.importorskip("fastapi")

import httpx

from drllm_fast.cli_models import Dtype, load_model
from drllm_fast.serving import server
from drllm_fast.serving import start as starting
from drllm_fast.serving.start import EngineSpec, bytes_per_token, start_worker


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"), template=TEMPLATE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policy", "skip:1", "--budget", "0.5"], ["fixes the path"]),
        (["--policy", "block-influence"], ["needs --budget"]),
        (["--kv-gib", "1", "--kv-tokens", "5"], ["not both"]),
        (["--kv-gib", "0"], ["--kv-gib 0", "above 0"]),
        (["--timeout", "-1"], ["--timeout", "above 0"]),
        (["--max-batch", "0"], ["--max-batch"]),
        (["--port", "70000"], ["--port"]),
        (["--device", "tpu"], ["--device tpu"]),
        (["--replicas", "2"], ["for --ray"]),
        (["--autoscale", "1:2"], ["for --ray"]),
        (["--ray", "--autoscale", "3:2"], ["MIN:MAX"]),
        (["--ray", "--autoscale", "many"], ["MIN:MAX"]),
        (["--ray", "--autoscale", "0:0"], ["MIN:MAX"]),
        (["--ray", "--autoscale", "1:2", "--replicas", "2"], ["not both"]),
        (["--api-key", " "], ["API key is empty"]),
        (["--host", "999.1.1.1"], ["cannot listen there"]),
    ],
    ids=lambda given: " ".join(given) if given[0].startswith("--") else "",
)
def test_refused_before_the_model_is_loaded(tiny, monkeypatch, options, words):
    monkeypatch.setattr(starting, "load_model", lambda *_: pytest.fail("loaded the model"))
    refused(call("serve", "--model", tiny, *options), *words)


def test_a_port_that_is_taken(tiny):
    with server.listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        refused(call("serve", "--model", tiny, "--port", port), f"--port {port}", "cannot listen there")


@pytest.mark.parametrize(
    ("missing", "extra"), [("fastapi", "serve"), ("prometheus_client", "serve"), ("ray", "ray-serve")]
)
def test_without_the_packages(tiny, monkeypatch, missing, extra):
    monkeypatch.setitem(sys.modules, missing, None)
    refused(call("serve", "--model", tiny, "--ray"), f'pip install "drllm-fast[{extra}]"')


def test_memory_for_keys_and_values(tiny):
    model, tokenizer = load_model(str(tiny), Dtype.auto, "cpu")
    assert bytes_per_token(model, tokenizer) == 2 * 2 * 8 * 4
    assert not hasattr(model, "routing")
    worker = start_worker(EngineSpec(str(tiny), device="cpu", kv_gib=2**-10))
    worker.close()
    assert worker.engine.pool.size == 2**20 // 128
    with pytest.raises(ValueError, match="--kv-gib 1e-09: not one token fits, which takes 128 bytes"):
        start_worker(EngineSpec(str(tiny), device="cpu", kv_gib=1e-9))


def test_the_process_finishes_what_it_has_when_it_is_told_to_end(tiny):
    process = start(
        "-m", "drllm_fast.cli", "serve", "--model", str(tiny), "--port", "0", "--policy", "skip:1", "--name", "small",
        "--max-tokens", "1500", "--device", "cpu",
    )  # fmt: skip
    try:
        said = process.stdout.readline()
        url = re.search(r"small at (http://127.0.0.1:\d+)/v1", said)[1]
        answers = []

        def ask():
            body = {"model": "small", "prompt": "Hello", "max_tokens": 1500, "ignore_eos": True}
            answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        until = time.monotonic() + 20
        while "drllm_fast_running 1.0" not in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < until
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/health").status_code != 503:
            assert time.monotonic() < until
        assert httpx.post(f"{url}/v1/completions", json={"model": "small", "prompt": "a"}).status_code == 503
        assert not answers
        thread.join(60)
        usage = answers[0].json()["usage"]
        assert (usage["completion_tokens"], usage["path"]) == (1500, [1, 0, 1, 1])
        assert process.wait(20) in (0, -signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    finally:
        process.kill()
        _, stderr = process.communicate()
    assert "Traceback" not in stderr
