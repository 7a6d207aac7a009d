"""A crowd at the server: many clients that stream, some of whom leave in the middle or send rubbish.

    python -m benchmarks.bench_serving --seconds 120 --clients 64
    python -m benchmarks.bench_serving --url http://127.0.0.1:8000 --model smollm2-135m-instruct

Without --url it starts `drllm-fast serve` with SmolLM2-135M-Instruct as a process of its own. It fails unless every
request was answered as it should be and unless nothing is left afterwards: no row, no place of the pool of keys and
values, in the server's own metrics. The table has the time to first token and the latency of answers that were read to
their end, requests by what became of them, tokens/s, and the memory of the server's process after its start, after a
quarter of the time and at the end.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer

from benchmarks.rounds import about_this_machine

MODEL = "smollm2-135m-instruct"
TOPICS = "the sea, bread, bicycles, winter, a lost key, tides, glass, moss, the number seven, trains".split(", ")
ASKS = "Tell me about {}.", "Write two sentences about {}.", "What is the use of {}?", "A poem on {}, please."


def otherwise(**changes: object) -> bytes:
    """A request with something wrong in it."""
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    return json.dumps({"model": MODEL, "messages": messages, "max_tokens": 4} | changes).encode()


# What is sent in place of a request, and the status that it must get.
RUBBISH = [
    (b"{", 400),
    (b"\x00\xff\xfe\x80" * 50, 400),
    (json.dumps({"model": MODEL, "messages": "hello"}).encode(), 400),
    (json.dumps({"model": "another", "messages": [{"role": "user", "content": "hello"}]}).encode(), 404),
    (b"[" * (1 << 20), 413),
    (otherwise(messages=[{"role": "user", "content": "sea " * (1 << 18)}]), 413),
    (otherwise(temperature="hot"), 400),
    (otherwise(max_tokens=-1), 400),
    (otherwise(budget=-0.5), 400),
    (otherwise(colour="blue"), 400),
]


@dataclass
class Seen:
    """Of all clients together."""

    statuses: Counter = field(default_factory=Counter)  # of answers, by status; "left", "broken"
    wrong: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    tokens: int = 0
    visits: int = 0  # of those tokens
    dense: int = 0


def request(rng: random.Random, model: str, tokens: int, budgets: list[float]) -> dict:
    text = rng.choice(ASKS).format(rng.choice(TOPICS)) + " " + " ".join(rng.choices(TOPICS, k=rng.randrange(40)))
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": rng.randint(tokens // 4, tokens),
        "temperature": rng.choice([0, 0.7, 1.0]),
        "seed": rng.randrange(1000),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return body | ({"budget": rng.choice(budgets)} if budgets else {})


async def client(
    http: httpx.AsyncClient, rng: random.Random, seen: Seen, until: float, make: dict, leaving: float, rubbish: float
) -> None:
    while time.monotonic() < until:
        does = rng.random()
        if does < rubbish:
            await send_rubbish(http, rng, seen)
        else:
            await send_request(http, rng, seen, request(rng, **make), leaves=does < rubbish + leaving)


async def send_rubbish(http: httpx.AsyncClient, rng: random.Random, seen: Seen) -> None:
    body, expected = rng.choice(RUBBISH)
    response = await http.post("/v1/chat/completions", content=body)
    seen.statuses[response.status_code] += 1
    if response.status_code != expected or "error" not in response.json():
        seen.wrong.append(f"{response.status_code} in place of {expected} for {body[:40]!r}")


async def send_request(http: httpx.AsyncClient, rng: random.Random, seen: Seen, body: dict, leaves: bool) -> None:
    begin, first, usage, text = time.monotonic(), None, None, ""
    last = rng.randint(1, 8)  # the event after which a client leaves
    ended = False
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            seen.statuses[response.status_code] += 1
            if response.status_code == 429:
                await asyncio.sleep(float(response.headers["retry-after"]) * rng.random())
            else:
                seen.wrong.append(f"{response.status_code}: {(await response.aread())[:200]!r}")
            return
        count = 0
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            count += 1
            if leaves and count > last:
                seen.statuses["left"] += 1
                return
            if line == "data: [DONE]":
                ended = True
                break
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                seen.wrong.append(line[:200])
            for choice in event.get("choices", []):
                text += choice["delta"].get("content", "")
                if text and first is None:
                    first = time.monotonic() - begin
            usage = event.get("usage") or usage
    if not ended or usage is None:
        seen.statuses["broken"] += 1
        seen.wrong.append(f"an answer ended after {len(text)} characters without [DONE] or its usage")
        return
    seen.statuses[200] += 1
    seen.latency.append(time.monotonic() - begin)
    if first is not None:
        seen.first.append(first)
    seen.tokens += usage["completion_tokens"]
    seen.visits += usage["completion_tokens"] * usage["layers_run"]
    seen.dense += usage["completion_tokens"] * usage["layers_dense"]


@contextmanager
def own_server(policy: str, budget: float | None, max_batch: int, clients: int) -> Iterator[tuple[str, int]]:
    """The address and the process id of a server that ends with the block."""
    command = [sys.executable, "-m", "drllm_fast.cli", "serve", "--model", MODEL, "--port", "0", "--policy", policy]
    command += ["--max-batch", str(max_batch), "--max-queue", str(2 * clients)]
    command += [] if budget is None else ["--budget", str(budget)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the server, too
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline()
            found = re.search(r"at (http://\S+)/v1", said)
            if found is None:
                raise SystemExit(f"the server did not start: {said}")
            yield found[1], process.pid
        finally:
            process.terminate()


def metrics(http: httpx.Client) -> dict[str, float]:
    lines = http.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def left_over(http: httpx.Client, seconds: float = 20.0) -> dict[str, float]:
    """Rows and places of the pool that are not given back within so long."""
    until = time.monotonic() + seconds
    while True:
        now = metrics(http)
        left = {name: now.get(f"drllm_fast_{name}", 0.0) for name in ("waiting", "running", "pool_used", "kv_bytes")}
        if not any(left.values()) or time.monotonic() > until:
            return left
        time.sleep(0.1)


def mib(pid: int | None) -> float | None:
    return None if pid is None else psutil.Process(pid).memory_info().rss / 2**20


async def crowd(url: str, headers: dict, clients: int, seconds: float, seed: int, pid: int | None, **does) -> tuple:
    seen, memory = Seen(), []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits) as http:
        until = time.monotonic() + seconds
        rngs = [random.Random(f"{seed} {number}") for number in range(clients)]
        running = [asyncio.ensure_future(client(http, rng, seen, until, **does)) for rng in rngs]
        await asyncio.sleep(seconds / 4)
        memory.append(mib(pid))
        await asyncio.gather(*running)
        memory.append(mib(pid))
    return seen, memory


def quantiles(values: list[float]) -> tuple[float, float]:
    """The median and the 99th percentile."""
    if len(values) < 2:
        return (values or [float("nan")])[0], (values or [float("nan")])[0]
    cut = statistics.quantiles(values, n=100, method="inclusive")
    return cut[49], cut[98]


def main(
    url: Annotated[str | None, typer.Option(help="Of a running server; default: one is started.")] = None,
    model: Annotated[str, typer.Option(help="Its name there.")] = MODEL,
    api_key: Annotated[str | None, typer.Option(envvar="DRLLM_FAST_API_KEY", help="Of that server.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="At once.")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="For which they send requests.")] = 120.0,
    tokens: Annotated[int, typer.Option(min=4, help="New tokens of a request, at most.")] = 64,
    leaving: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that are left in the middle.")] = 0.1,
    rubbish: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that are rubbish.")] = 0.1,
    budgets: Annotated[str, typer.Option(help="Drawn from for each request, such as 1.0,0.9,0.8.")] = "",
    policy: Annotated[str, typer.Option(help="Of the server that is started.")] = "dense",
    budget: Annotated[float | None, typer.Option(help="Of the same.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Of the same.")] = 64,
    seed: Annotated[int, typer.Option(help="Of what clients do.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="File (.md) for the table, and what it was measured with.")
    ] = None,
) -> None:
    """Stream from a server with many clients at once, and check that nothing is lost and nothing is left."""
    does, own = (clients, seconds, tokens, leaving, rubbish, budgets, seed), url is None
    if own:
        with own_server(policy, budget, max_batch, clients) as (url, pid):
            report, wrong = measure(url, pid, model, None, *does)
    else:
        report, wrong = measure(url, None, model, api_key, *does)
    print(report)
    if output is not None:
        about = {"server": url}  # the command may hold its key
        if own:
            command = shlex.join(["python", "-m", "benchmarks.bench_serving", *sys.argv[1:]])
            about = {"command": command, **about_this_machine("cpu")}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("\n".join([*(f"{name}: {value}" for name, value in about.items()), "", report]) + "\n")
    if wrong:
        raise SystemExit(wrong)


def measure(url, pid, model, api_key, clients, seconds, tokens, leaving, rubbish, budgets, seed) -> tuple[str, str]:
    """The table, and what went wrong, if anything did."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    make = {"model": model, "tokens": tokens, "budgets": [float(b) for b in budgets.split(",") if b]}
    memory = [mib(pid)]
    begin = time.monotonic()
    seen, later = asyncio.run(
        crowd(url, headers, clients, seconds, seed, pid, make=make, leaving=leaving, rubbish=rubbish)
    )
    took = time.monotonic() - begin
    with httpx.Client(base_url=url, headers=headers, timeout=30) as http:
        left = left_over(http)
        healthy = http.get("/health").status_code == 200
    report = table(seen, memory + later, took, clients)
    report += f"\n\n{len(seen.wrong)} wrong answers; left over: {left}; healthy: {healthy}"
    sound = not seen.wrong and not any(left.values()) and healthy and seen.latency
    return report, "" if sound else "\n".join(["the crowd was not served as it should be", *seen.wrong[:20]])


def table(seen: Seen, memory: list[float | None], took: float, clients: int) -> str:
    rows = [("clients", f"{clients}"), ("seconds", f"{took:.0f}")]
    for name, values in (("time to first token", seen.first), ("latency", seen.latency)):
        middle, high = quantiles(values)
        rows.append((f"{name}, p50 / p99", f"{middle:.2f} s / {high:.2f} s"))
    rows.append(("answers/s", f"{seen.statuses[200] / took:.2f}"))
    rows.append(("tokens/s", f"{seen.tokens / took:.0f}"))
    rows.append(("share of the layers", f"{seen.visits / seen.dense:.3f}" if seen.dense else "-"))
    rows += [(f"requests: {status}", str(count)) for status, count in sorted(seen.statuses.items(), key=str)]
    if None not in memory:
        rows.append(("server's memory, begin / warm / end", " / ".join(f"{m:.0f} MiB" for m in memory)))
    return "\n".join(["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)])


if __name__ == "__main__":
    typer.run(main)
