"""OpenAI's requests, as far as they are served: what may be asked, and what it means for the engine.

A field that changes answers and cannot be honoured is refused unless it has the value that changes nothing, a field
that nobody knows always.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from drllm_fast.generation import Sampling
from drllm_fast.serving.errors import BadRequest, UnknownModel
from drllm_fast.serving.settings import ServerSettings

# OpenAI's fields that are not supported, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
}
# Those that say nothing about the answer.
HARMLESS = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
ROLES = {"developer": "system"}  # what templates call it


def _same(a: Any, b: Any) -> bool:
    """Where False is not 0: as logprobs, 0 asks for something."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": ROLES.get(self.role, self.role), "content": content}


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Common(Strict):
    """Of both requests. What is left out: temperature 1, as OpenAI has it; the server's number of tokens."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    budget: Annotated[float, Field(gt=0, le=2)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, neutral in NEUTRAL.items():
            if name in given and not any(_same(given[name], value) for value in neutral):
                raise ValueError(f"{name} is not supported, got {given[name]!r:.80}; leave it out")
        return {name: value for name, value in given.items() if name not in NEUTRAL and name not in HARMLESS}

    @model_validator(mode="after")
    def _consistent(self) -> Common:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens say different things; give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream=true")
        return self

    def sampling(self, settings: ServerSettings) -> Sampling:
        """A request without a seed gets one, so that it may be answered a second time where a replica dies."""
        asked = self.max_completion_tokens or self.max_tokens
        if asked is not None and asked > settings.max_tokens:
            raise BadRequest(f"max_tokens is at most {settings.max_tokens} on this server, got {asked}", "max_tokens")
        try:
            return Sampling(
                max_new_tokens=asked or min(settings.default_tokens, settings.max_tokens),
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=self.top_k or 0,
                top_p=1.0 if self.top_p is None else self.top_p,
                seed=secrets.randbits(63) if self.seed is None else self.seed,
                stop=() if self.stop is None else self.stop,
                ignore_eos=bool(self.ignore_eos),
            )
        except (TypeError, ValueError) as error:
            raise BadRequest(str(error)) from error

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1)]

    def for_engine(self) -> list[dict[str, str]]:
        return [message.plain() for message in self.messages]


class CompletionRequest(Common):
    prompt: str | Annotated[list[int], Field(min_length=1)] | Annotated[list[str], Field(min_length=1, max_length=1)]

    def for_engine(self) -> str | list[int]:
        one = isinstance(self.prompt, list) and isinstance(self.prompt[0], str)
        return self.prompt[0] if one else self.prompt


def parse(kind: type[Common], body: bytes, settings: ServerSettings) -> Any:
    """The request that a body holds. BadRequest, or UnknownModel."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from error
    if request.model != settings.model:
        raise UnknownModel(f"there is no model {request.model!r:.80}, this server has {settings.model!r}", "model")
    return request


def _refusal(error: ValidationError) -> BadRequest:
    """The first of what is wrong; of a union's branches, the one that got furthest."""
    found = error.errors(include_url=False, include_context=False)
    first = max(found, key=lambda e: len(e["loc"]) if e["loc"][:1] == found[0]["loc"][:1] else -1)
    param = str(first["loc"][0]) if first["loc"] else None
    where = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
    given = "" if first["type"] in ("missing", "json_invalid", "value_error") else f", got {first['input']!r:.80}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message, given = "there is no such field; see the documentation for those that there are", ""
    return BadRequest(f"{where}{message}{given}", param)
