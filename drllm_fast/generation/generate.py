"""`drllm_fast.generate`: the engine run over a list of prompts, or over as many as an iterable gives."""

from __future__ import annotations

import contextvars
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, overload

from torch import nn

from drllm_fast.generation.calibration import BATCHES
from drllm_fast.generation.engine import Engine
from drllm_fast.generation.requests import Delta, Generation, encode
from drllm_fast.generation.sampling import Sampling

Prompt = str | Sequence[int] | Sequence[dict]
Stream = Literal["ordered", "finished", "tokens"]
STREAMS = ("ordered", "finished", "tokens")


@overload
def generate(model: nn.Module, tokenizer: Any, prompts: Iterable[Prompt], **options: Any) -> list[Generation]: ...
@overload
def generate(
    model: nn.Module, tokenizer: Any, prompts: Iterable[Prompt], *, stream: Stream, **options: Any
) -> Iterator[Generation] | Iterator[Delta]: ...
def generate(
    model,
    tokenizer,
    prompts,
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | Sequence[Sampling] | None = None,
    budgets: float | Sequence[float | None] | None = None,
    paths: Sequence[Sequence[int] | None] | None = None,
    stream: Stream | None = None,
    progress: bool = False,
    **engine: Any,
):
    """Answer many prompts, of any lengths and paths, in the order in which they are given.

    model           a causal language model from transformers, routed (`enable_dynamic_routing`) or not; left as it was
    prompts         texts, lists of token ids, or chats (lists of messages with role and content); any iterable, of
                    which no more is read than is worked on
    max_new_tokens  of every answer; 64 unless `sampling` says otherwise
    sampling        how answers are chosen, one `Sampling` for all or one for each prompt; greedy by default
    budgets         in place of the policy's own budget, one for all or one for each prompt
    paths           a layer path for each prompt, in place of what the policy says; None for one that it decides
    stream          None: a list of `Generation`. Else an iterator: "ordered", each `Generation` as soon as those before
                    it are there; "finished", each when it ends (`index` says whose it is); "tokens", a `Delta` for each
                    token of each prompt
    progress        a bar on stderr
    engine          what `Engine` takes: max_batch, lookahead, max_prompt_tokens, kv_tokens, row_tokens, pack_weights,
                    graphs, order

    Answers do not depend on what else is answered: in fp32 they are, token for token, those of each prompt alone, up to
    scores that differ by less than the rounding of a sum; with packed weights on the CPU, where all products are linear
    layers, bit for bit.

    Raises TypeError or ValueError, for everything that can be known before the first token is made where `prompts` is a
    sequence, and what `enable_dynamic_routing` raises.
    """
    if stream is not None and stream not in STREAMS:
        raise ValueError(f"stream must be None or one of {', '.join(STREAMS)}, got {stream!r:.80}")
    if isinstance(prompts, str | dict):
        raise TypeError(f"prompts must be a list of prompts, got {type(prompts).__name__}; write [prompt]")
    count = len(prompts) if hasattr(prompts, "__len__") else None
    samplings = _each(_defaults(sampling, max_new_tokens), Sampling, count, "sampling")
    each_budget = _each(budgets, float | int | None, count, "budgets")
    each_path = itertools.repeat(None) if paths is None else _listed(paths, count, "paths")
    jobs = _jobs(prompts, sampling=samplings, budgets=each_budget, paths=each_path)
    if count is not None:  # all are looked at before the first is worked on
        jobs = [(encode(tokenizer, prompt), s, b, p) for prompt, s, b, p in jobs]
        longest = max((len(ids) + s.max_new_tokens for ids, s, _, _ in jobs if isinstance(s, Sampling)), default=1)
        engine = {"row_tokens": longest, **engine}
        if count <= BATCHES[0]:  # no batch would be smaller, so that nothing need be measured
            engine = {"max_batch": max(count, 1), "lookahead": 0, **engine}
    runner = Engine(model, tokenizer, **engine)
    if count is not None:
        with runner:
            for ids, s, b, p in jobs:
                runner.encoded(ids, s, budget=b, path=p)
    answers = _progress(_run(runner, iter(jobs), contextvars.copy_context()), count, progress)
    if stream == "tokens":
        return answers
    results = (delta.result for delta in answers if delta.result is not None)
    if stream == "finished":
        return results
    return _ordered(results) if stream == "ordered" else list(_ordered(results))


def _jobs(prompts: Iterable, **each: Iterable) -> Iterator[tuple]:
    """Each prompt with what is its own. ValueError where that ends before the prompts do."""
    iterators = {name: iter(values) for name, values in each.items()}
    missing = object()
    for number, prompt in enumerate(prompts):
        own = {name: next(values, missing) for name, values in iterators.items()}
        for name, value in own.items():
            if value is missing:
                raise ValueError(f"{number} {name} for more prompts; give one for each")
        yield prompt, *own.values()


def _run(engine: Engine, jobs: Iterator[tuple], context: contextvars.Context) -> Iterator[Delta]:
    """Prompts go in as room comes up; twice the rows that are worked on wait, so that forwards that read are full.

    context  of the call, with the path of a `model.routing.using` around it: a stream may be read outside of that
    """
    with engine:
        more = True
        while more or engine.busy:
            while more and len(engine.schedule.waiting) < 2 * (engine.schedule.max_batch + engine.schedule.lookahead):
                job = next(jobs, None)
                more = job is not None
                if more:
                    prompt, sampling, budget, path = job
                    context.run(engine.submit, prompt, sampling, budget=budget, path=path)
            if engine.busy:
                yield from engine.step()


def _ordered(results: Iterator[Generation]) -> Iterator[Generation]:
    early: dict[int, Generation] = {}
    due = 0
    for result in results:
        early[result.index] = result
        while due in early:
            yield early.pop(due)
            due += 1


def _progress(deltas: Iterator[Delta], count: int | None, shown: bool) -> Iterator[Delta]:
    if not shown:
        yield from deltas
        return
    from tqdm import tqdm

    with tqdm(total=count, unit="prompt", desc="Generating") as bar:
        tokens = 0
        for delta in deltas:
            tokens += len(delta.tokens)
            if delta.result is not None:
                bar.set_postfix_str(f"{tokens} tokens", refresh=False)
                bar.update()
            yield delta


def _defaults(sampling: Any, max_new_tokens: int | None) -> Any:
    if max_new_tokens is None:
        return Sampling() if sampling is None else sampling
    if sampling is not None:
        raise ValueError("give max_new_tokens as a part of sampling, or without it")
    return Sampling(max_new_tokens=max_new_tokens)


def _each(given: Any, kind: Any, count: int | None, name: str) -> Iterable:
    """One for each prompt."""
    return itertools.repeat(given) if isinstance(given, kind) else _listed(given, count, name)


def _listed(given: Any, count: int | None, name: str) -> Iterable:
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise TypeError(f"{name} must be one for all prompts or one for each, got {type(given).__name__}")
    if hasattr(given, "__len__") and count is not None and len(given) != count:
        raise ValueError(f"{len(given)} {name} for {count} prompts; give one for each")
    return given
