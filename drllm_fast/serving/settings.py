"""What a server allows. One object, which also travels to the replicas of Ray Serve."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ServerSettings:
    """model           the name under which the model is served
    max_body_bytes     of a request
    max_prompt_tokens  of a prompt
    max_tokens         that a request may ask for
    default_tokens     where it does not say; never more than max_tokens
    timeout            seconds from the arrival of a request to the end of its answer, and for its body to arrive
    api_key            asked for as `Authorization: Bearer KEY` under /v1; None: everybody may
    """

    model: str
    max_body_bytes: int = 256 << 10
    max_prompt_tokens: int = 8192
    max_tokens: int = 1024
    default_tokens: int = 256
    timeout: float = 120.0
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_prompt_tokens", "max_tokens", "default_tokens", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.api_key is not None:
            object.__setattr__(self, "api_key", self.api_key.strip())  # a header brings no space around it
            if not self.api_key:
                raise ValueError("the API key is empty; leave it out to let everybody in")
