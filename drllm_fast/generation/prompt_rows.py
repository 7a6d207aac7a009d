"""A prompt as a row of a data set: what the row may say, and the answers to many rows.

A row is a dict with one of
    prompt    a text; where the tokenizer has a chat template, it is a user's message unless chat=False
    messages  a chat: [{"role": "user", "content": "..."}, ...]
    tokens    token ids
and, each in place of what holds for all rows, max_new_tokens, temperature, top_k, top_p, seed, stop (a text or several
of them), budget (for a policy that keeps one) and path (how often each block runs). `id` goes with the answer.
"""

from __future__ import annotations

import difflib
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal

from torch import nn

from drllm_fast.decoder import decoder_of, row_positions
from drllm_fast.generation.engine import Engine
from drllm_fast.generation.generate import generate
from drllm_fast.generation.requests import Generation
from drllm_fast.generation.sampling import Sampling

PROMPTS = {"prompt": str, "messages": list, "tokens": list}
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
FIELDS = ("id", *PROMPTS, *SAMPLING, "budget", "path")
LIKENESS = 0.85  # of difflib, above which an unknown field is taken for a misspelt one: max_new_token, not question
NO_LIMIT = 2**62  # tokens of a pool that is never filled
ROW_TOKENS = 1024  # for which the pool has room on average


@dataclass(frozen=True)
class PromptRow:
    """A row whose fields are of their types. `where` begins errors about it, `line` is its number in a file."""

    where: str
    line: int
    prompt: str | list
    sampling: Sampling
    budget: float | None = None
    path: tuple[int, ...] | None = None
    id: Any = None
    kept: dict[str, Any] = field(default_factory=dict)


def check_row(row: dict[str, Any], where: str, line: int, defaults: Sampling, keep: Collection[str] = ()) -> PromptRow:
    """A row as a `PromptRow`; a field that is null counts as left out, and so does one that is not known.

    defaults  of what the row does not say
    keep      fields that go with the answer

    ValueError, with the place, for a wrong type or value, and for an unknown field that looks like a misspelt one.
    """
    given = {name: value for name, value in row.items() if value is not None}
    for name in given.keys() - set(FIELDS) - set(keep):
        if meant := difflib.get_close_matches(name, FIELDS, n=1, cutoff=LIKENESS):
            raise ValueError(f"{where}: no field is called {name!r}; did you mean {meant[0]!r}? Rename it or drop it")
    for name in keep:
        if name not in row:
            raise ValueError(f"{where}: there is no field {name!r} to keep; the row has {', '.join(row) or 'none'}")
    kinds = [name for name in PROMPTS if name in given]
    if len(kinds) != 1:
        found = " and ".join(kinds) or f"none of them (its fields: {', '.join(row) or 'none'})"
        raise ValueError(f"{where}: a row has one of 'prompt', 'messages' and 'tokens', found {found}")
    prompt = given[kinds[0]]
    _expect(type(prompt) is PROMPTS[kinds[0]], where, kinds[0], prompt, "a text" if kinds[0] == "prompt" else "a list")
    if kinds[0] == "prompt":
        _expect(bool(prompt.strip()), where, "prompt", prompt, "a text that is not blank")
    else:
        of = dict if kinds[0] == "messages" else int
        allowed = "a list of messages, objects with role and content" if of is dict else "a list of token ids"
        _expect(bool(prompt) and all(type(part) is of for part in prompt), where, kinds[0], prompt, allowed)
    budget, path = given.get("budget"), given.get("path")
    if budget is not None:
        _expect(_is_number(budget) and 0 < budget <= 2, where, "budget", budget, "a number above 0, up to 2")
    if path is not None:
        whole = isinstance(path, list) and all(type(n) is int and n in (0, 1, 2) for n in path)
        _expect(whole, where, "path", path, "a list of 0 (skip), 1 (execute) and 2 (repeat), one for each block")
        _expect(budget is None, where, "budget", budget, "left out, where there is a path")
    _expect(isinstance(given.get("id", ""), str | int | float), where, "id", given.get("id"), "a text or a number")
    try:
        sampling = replace(defaults, **{name: given[name] for name in SAMPLING if name in given})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    kept = {name: row[name] for name in keep}
    return PromptRow(where, line, prompt, sampling, budget, None if path is None else tuple(path), row.get("id"), kept)


def encode_rows(
    model: nn.Module, tokenizer: Any, rows: Sequence[PromptRow], *, chat: bool | None = None
) -> list[array]:
    """The tokens of each row's prompt, after all has been checked that the model, its policy and the tokenizer can say.

    chat   whether a text is a user's message in the tokenizer's chat template; by default if it has one

    ValueError, with the place, for a row that cannot be answered; else what `enable_dynamic_routing` raises.
    """
    if chat is None:
        chat = getattr(tokenizer, "chat_template", None) is not None
    tokens = []
    options = {"max_batch": 1, "lookahead": 0, "kv_tokens": NO_LIMIT, "pack_weights": False}  # it only checks
    with Engine(model, tokenizer, **options) as engine:
        for row in rows:
            prompt = row.prompt
            if chat and isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            try:
                ids = engine.encoded(prompt, row.sampling, budget=row.budget, path=row.path)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{row.where}: {error}") from error
            tokens.append(array("q", ids))
    return tokens


def answer_rows(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[PromptRow],
    tokens: Sequence[array],
    *,
    stream: Literal["ordered", "finished"],
    max_batch: int = 64,
) -> Iterator[Generation]:
    """The answers to rows whose prompts `encode_rows` made into `tokens`; their `index` says whose they are.

    stream      as of `generate`
    max_batch   rows that decode together
    """
    return generate(
        model,
        tokenizer,
        iter(tokens),  # checked already, so they need not be looked at again
        sampling=(row.sampling for row in rows),
        budgets=(row.budget for row in rows),
        paths=(row.path for row in rows),
        stream=stream,
        **engine_options(model, rows, tokens, max_batch),
    )


def engine_options(
    model: nn.Module, rows: Sequence[PromptRow], tokens: Sequence[array], max_batch: int
) -> dict[str, int]:
    """What `Engine` is made with for these rows: as many are read ahead as decode together."""
    decoder = decoder_of(model)
    lengths, new = [len(ids) for ids in tokens], [row.sampling.max_new_tokens for row in rows]
    places = pool_tokens(
        lengths, new, blocks=len(decoder.layers), positions=row_positions(decoder.config), rows=2 * max_batch
    )
    return {"max_batch": max_batch, "lookahead": max_batch, "kv_tokens": places}


def pool_tokens(lengths: Sequence[int], new: Sequence[int], *, blocks: int, positions: int | None, rows: int) -> int:
    """Tokens of one visit for which a pool needs room: for `rows` prompts of a usual length, for all if they are fewer
    or shorter, and in any case for the longest, should each of its blocks run twice."""
    most = [n + (m if positions is None else min(m, positions - n)) for n, m in zip(lengths, new, strict=True)]
    needs = [2 * blocks * count for count in most]
    return max(max(needs, default=1), min(sum(needs), rows * blocks * ROW_TOKENS))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _expect(condition: bool, where: str, name: str, given: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{where}: '{name}' is {given!r:.80}; it must be {allowed}")
