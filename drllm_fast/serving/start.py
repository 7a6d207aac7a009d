"""From what a user asks for to a worker that answers: in the process of the command, or in a replica of Ray Serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from drllm_fast.cli_models import Dtype, find_device, load_model
from drllm_fast.cli_policies import apply_policy, parse_policy
from drllm_fast.generation import Engine, Sampling
from drllm_fast.serving.worker import Worker


@dataclass(frozen=True)
class EngineSpec:
    """What `drllm-fast serve` says of the model and the engine; kv_gib is another way to say kv_tokens."""

    model: str
    policy: str = "dense"
    budget: float | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_batch: int = 64
    kv_tokens: int | None = None
    kv_gib: float | None = None
    max_requests: int = 256
    max_prompt_tokens: int = 8192


def start_worker(spec: EngineSpec) -> Worker:
    """Load the model and start its worker. ValueError, OSError and what the engine raises for the model."""
    policy = parse_policy(spec.policy, spec.budget)
    model, tokenizer = load_model(spec.model, Dtype(spec.dtype), find_device(spec.device))
    apply_policy(model, tokenizer, policy, model.config.get_text_config(decoder=True).num_hidden_layers)
    kv_tokens = spec.kv_tokens
    if spec.kv_gib is not None:
        kv_tokens = int(spec.kv_gib * 2**30 / (size := bytes_per_token(model, tokenizer)))
        if kv_tokens < 1:
            raise ValueError(f"--kv-gib {spec.kv_gib}: not one token fits, which takes {size} bytes for each layer")
    engine = Engine(model, tokenizer, max_batch=spec.max_batch, lookahead=0, kv_tokens=kv_tokens)
    return Worker(engine, max_requests=spec.max_requests, max_prompt_tokens=spec.max_prompt_tokens).start()


def bytes_per_token(model: Any, tokenizer: Any) -> int:
    """Keys and values of a token and one visit, seen at a prompt of one token."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    with Engine(model, tokenizer, max_batch=1, lookahead=0, kv_tokens=layers, pack_weights=False) as engine:
        engine.submit([0], Sampling(max_new_tokens=1), path=[1] * layers)
        engine.step()
        return engine.pool.bytes_per_token()
