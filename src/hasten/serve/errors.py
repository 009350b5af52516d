"""What goes wrong with a request, as clients of OpenAI's API read it."""

from __future__ import annotations

from typing import Any

from hasten.errors import UserError


class ApiError(Exception):
    """An error with a status.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the field that is wrong, if it is one.
        code: what programs ask for.
        retry_after: seconds after which to come again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def document(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told: a `UserError` is the client's, anything else the server's."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    return ApiError(500, f"{type(error).__name__} while the request was decoded", code="internal_error")
