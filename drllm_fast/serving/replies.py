"""A `Generation`, or a `Delta`, as OpenAI's objects."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from drllm_fast.generation import Delta, Generation
from drllm_fast.serving.errors import ServingError

DONE = b"data: [DONE]\n\n"


def usage(result: Generation) -> dict[str, Any]:
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": len(result.tokens),
        "total_tokens": result.prompt_tokens + len(result.tokens),
        "layers_run": result.visits,  # of each token
        "layers_dense": len(result.path),
        "path": list(result.path),
    }


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


class Reply:
    """The objects of one answer.

    chat           a chat completion, else a text completion
    include_usage  as an event of its own at the end of a stream
    """

    def __init__(self, model: str, chat: bool, include_usage: bool = False):
        self.chat, self.include_usage = chat, include_usage
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, result: Generation) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": result.text}} if self.chat else {"text": result.text}
        kind = "chat.completion" if self.chat else "text_completion"
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": result.finish_reason}
        return {**self._head, "object": kind, "choices": [choice], "usage": usage(result)}

    def begin(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""}) if self.chat else b""

    def delta(self, delta: Delta) -> bytes:
        """Its events, none for tokens whose text is not certain yet."""
        said = {"content": delta.text} if self.chat else delta.text
        out = self._chunk(said) if delta.text else b""
        if delta.result is not None:
            out += self._chunk({} if self.chat else "", delta.result.finish_reason)
            if self.include_usage:
                out += event({**self._head, "object": self._kind, "choices": [], "usage": usage(delta.result)})
        return out

    def failed(self, error: ServingError) -> bytes:
        return event(error.body())

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, said: Any, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta" if self.chat else "text": said, "logprobs": None, "finish_reason": finish_reason}
        body = {**self._head, "object": self._kind, "choices": [choice]}
        return event({**body, "usage": None} if self.include_usage else body)
