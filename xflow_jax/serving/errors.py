"""Errors that clients get as JSON, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping

from xflow_jax.errors import UserError

_BAD = "invalid_request_error"


class ApiError(Exception):
    """Error that a client gets as JSON.

    Attributes:
        status: HTTP status.
        kind: OpenAI's `type`.
        param: the wrong field, or None.
        code: a short name of the reason, or None.
        headers: further headers of the response.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Escapes and shortens the message."""
        super().__init__(str(UserError(message)))
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's name for errors of this status."""
        names = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return names.get(self.status, "server_error" if self.status >= 500 else _BAD)

    def body(self) -> dict[str, object]:
        """Returns the error as an object for JSON."""
        about = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": about}
