"""What can become of a request but an answer, each with its HTTP status and OpenAI's names for it.

They cross processes under Ray Serve, so that each is made of its message alone.
"""

from __future__ import annotations

from typing import Any


class ServingError(Exception):
    status = 500
    kind = "server_error"
    code: str | None = None
    headers: dict[str, str] = {}

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class BadRequest(ServingError):
    status, kind = 400, "invalid_request_error"


class Unauthorized(BadRequest):
    status, code, headers = 401, "invalid_api_key", {"WWW-Authenticate": "Bearer"}


class UnknownModel(BadRequest):
    status, code = 404, "model_not_found"


class BodyTimeout(BadRequest):
    status, code = 408, "body_timeout"


class BodyTooLarge(BadRequest):
    status, code = 413, "body_too_large"


class Full(ServingError):
    status, kind, code, headers = 429, "rate_limit_error", "server_full", {"Retry-After": "1"}


class ClientGone(ServingError):
    status, code = 499, "client_gone"


class EngineFailed(ServingError):
    status, code = 500, "engine_failed"


class Unavailable(ServingError):
    status, code, headers = 503, "unavailable", {"Retry-After": "5"}


class TimedOut(ServingError):
    status, code = 504, "timeout"
