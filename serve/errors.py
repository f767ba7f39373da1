"""Errors of the API, in OpenAI's JSON format."""

from collections.abc import Mapping

from lit_llm.errors import InputError


class ApiError(Exception):
    """An error response.

    Args:
        status: HTTP status.
        message: Message for the client; it never quotes long parts of the request.
        param: The field that is wrong.
        code: OpenAI's machine-readable error code.
        kind: OpenAI's `type`; null derives it from the status.
        headers: Headers of the response.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 kind: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kind or kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(error: InputError, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Convert an `InputError` to a 400 response; its place becomes the field."""
    field = error.where or None
    text = f"{field}: {error.what}" if field else error.what
    return ApiError(400, text, param=param or field, code=code)
