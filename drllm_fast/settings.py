"""What the context managers of a thread ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from drllm_fast.policies import GivenPlan


@dataclass(frozen=True)
class Settings:
    """For one model, and what `generate` notes of itself."""

    disabled: bool = False
    plan: GivenPlan | None = None
    context: tuple[int, ...] | None = None
    prompt_columns: int | None = None  # set by generate: later columns are draft or answer tokens
    count_positions: bool = False  # set by generate: its position_ids are its own, and go wrong after right padding


# Per thread and task, settings by the Routing they are for. Replaced, never changed.
_SETTINGS: ContextVar[dict[object, Settings]] = ContextVar("drllm_fast_settings", default={})  # noqa: B039
_DEFAULT = Settings()


def current(routing: object) -> Settings:
    return _SETTINGS.get().get(routing, _DEFAULT)


# The Routing whose next forward is one that `generate` prepared. Others that run inside generate (a second model of a
# logits processor, a negative prompt) are forwards like any other.
_MARKED: ContextVar[object | None] = ContextVar("drllm_fast_marked", default=None)


def mark(routing: object) -> None:
    _MARKED.set(routing)


def take_mark(routing: object) -> bool:
    marked = _MARKED.get() is routing
    if marked:
        _MARKED.set(None)
    return marked


@contextmanager
def changed(routing: object, **changes) -> Iterator[None]:
    """Inside, in this thread, `routing` has these settings as well."""
    token = _SETTINGS.set({**_SETTINGS.get(), routing: replace(current(routing), **changes)})
    try:
        yield
    finally:
        _SETTINGS.reset(token)
