"""A prompt on its way through the engine, and what becomes of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from drllm_fast.generation.sampling import Sampling
from drllm_fast.generation.text_stream import TextStream


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt.

    index           number of the prompt
    text            without special tokens, up to the stop text that ended it
    tokens          the new tokens; without an end-of-sequence token, with those of a stop text
    path            how often each block ran: 0 skip, 1 execute, 2 repeat
    visits          blocks run for each token, the sum of the path
    finish_reason   "stop" (end of sequence, or a stop text), "length" (max_new_tokens)
    prompt_tokens   tokens of the prompt
    kv_bytes        keys and values that it held at its end
    waited          seconds until the forward began that read its prompt
    first_token     seconds until its first token, from when it was submitted
    seconds         until its end
    """

    index: int
    text: str
    tokens: list[int]
    path: tuple[int, ...]
    visits: int
    finish_reason: str
    prompt_tokens: int
    kv_bytes: int
    waited: float
    first_token: float
    seconds: float


@dataclass(frozen=True)
class Delta:
    """A step of one answer: the tokens and the certain text that are new, and at its end the whole of it."""

    index: int
    text: str
    tokens: list[int]
    result: Generation | None = None


@dataclass(eq=False)
class Request:
    """A prompt that an engine answers, made by `Engine.submit`. Times are of `time.monotonic`."""

    index: int
    prompt: list[int]
    sampling: Sampling
    policy: Any
    bound: int  # visits that its path has at most
    capacity: int  # tokens that each of its visits may hold
    text: TextStream
    submitted: float = field(default_factory=time.monotonic)
    read_at: float | None = None
    first_at: float | None = None
    path: tuple[int, ...] = ()
    visits: int = 0
    start: int = 0  # of its span of the pool
    held: int = 0  # tokens of each visit in its span; the newest is written by the next step
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # as of `Generation`; or "cancelled" or "error", without a Generation

    @property
    def span(self) -> int:
        """Tokens of its span."""
        return self.visits * self.capacity

    def result(self, bytes_per_token: int) -> Generation:
        now = time.monotonic()
        return Generation(
            index=self.index,
            text=self.text.text,
            tokens=list(self.tokens),
            path=self.path,
            visits=self.visits,
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.prompt),
            kv_bytes=self.visits * self.held * bytes_per_token,
            waited=self.read_at - self.submitted,
            first_token=self.first_at - self.submitted,
            seconds=now - self.submitted,
        )


def encode(tokenizer: Any, prompt: str | Sequence[int] | Sequence[dict]) -> list[int]:
    """Tokens of a prompt: a text, token ids, or the messages of a chat. TypeError or ValueError for anything else."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        if not ids:
            raise ValueError(f"the tokenizer makes no token of the prompt {prompt!r:.80}")
        return list(ids)
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise TypeError(f"a prompt is a text, token ids or the messages of a chat, got {type(prompt).__name__}")
    if not prompt:
        raise ValueError("a prompt has no tokens or messages; give at least one token, such as the tokenizer's bos")
    if all(isinstance(message, dict) for message in prompt):
        return _encode_chat(tokenizer, prompt)
    if any(isinstance(token, bool) or not isinstance(token, int) for token in prompt):
        raise TypeError(f"a prompt of token ids holds integers alone, got {prompt!r:.80}")
    return list(prompt)


def _encode_chat(tokenizer: Any, messages: Sequence[dict]) -> list[int]:
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(f"a message has a role and a content, both texts, got {message!r:.80}")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("this tokenizer has no chat template; give a text instead of messages")
    return list(
        tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    )
