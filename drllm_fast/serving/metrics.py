"""What a server counts, for Prometheus, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from drllm_fast.generation import Generation

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
GAUGES = {
    "waiting": "Prompts that wait to be read",
    "running": "Prompts that are being answered",
    "kv_bytes": "Keys and values held for tokens, in bytes",
    "pool_used": "Places of the pool of keys and values that belong to prompts, in tokens of one visit",
    "pool_size": "Places of the pool, in tokens of one visit",
    "resent": "Times that a request was sent to another replica, since one had died or failed",
}


class Metrics:
    """snapshot  called at each scrape for an object whose attributes are some of GAUGES"""

    def __init__(self, snapshot: Callable[[], Any]):
        self.registry = CollectorRegistry()
        self._snapshot = snapshot
        self.requests = Counter(
            "drllm_fast_requests",
            "Requests by endpoint and HTTP status; 499 where the client left",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.prompt_tokens, self.completion_tokens, self.layers_run, self.layers_dense = (
            Counter(f"drllm_fast_{name}", text, registry=self.registry)
            for name, text in (
                ("prompt_tokens", "Tokens of prompts that were answered"),
                ("completion_tokens", "Tokens of their answers"),
                ("layers_run", "Visits of layers by those tokens"),
                ("layers_dense", "What these would be if each token ran each layer once"),
            )
        )
        self.first_token, self.latency = (
            Histogram(f"drllm_fast_{name}_seconds", text, ["endpoint"], buckets=SECONDS, registry=self.registry)
            for name, text in (
                ("time_to_first_token", "From the arrival of a request to its first token"),
                ("request_latency", "From the arrival of a request to the end of its answer"),
            )
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        for name, value in vars(self._snapshot()).items():
            yield GaugeMetricFamily(f"drllm_fast_{name}", GAUGES[name], value=value)

    def answered(self, endpoint: str, result: Generation, latency: float) -> None:
        tokens = result.prompt_tokens + len(result.tokens)
        self.prompt_tokens.inc(result.prompt_tokens)
        self.completion_tokens.inc(len(result.tokens))
        self.layers_run.inc(result.visits * tokens)
        self.layers_dense.inc(len(result.path) * tokens)
        self.first_token.labels(endpoint).observe(max(0.0, latency - (result.seconds - result.first_token)))
        self.latency.labels(endpoint).observe(latency)

    def text(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
