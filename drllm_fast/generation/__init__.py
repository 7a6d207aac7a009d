"""Answering many prompts: the engine, and `generate` over it."""

from drllm_fast.generation.engine import Engine, EngineStats
from drllm_fast.generation.generate import generate
from drllm_fast.generation.requests import Delta, Generation
from drllm_fast.generation.sampling import Sampling

__all__ = ["Delta", "Engine", "EngineStats", "Generation", "Sampling", "generate"]
