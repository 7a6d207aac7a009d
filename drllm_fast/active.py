"""The routed forward that is running in this thread, for the two places that Hugging Face's own code calls back into:
the cache's `update` and the attention function."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drllm_fast.executor import RoutedForward

ACTIVE: ContextVar[RoutedForward | None] = ContextVar("drllm_fast_active", default=None)
