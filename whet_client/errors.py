"""What can go wrong, as exceptions that know what the platform said."""


class WhetError(Exception):
    """A call that failed. `status` is the HTTP status, None when no answer came; `code` is the reason for programs."""

    def __init__(
        self, message: str, *, status: int | None = None, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param


class InvalidRequest(WhetError):
    """The platform does not understand the call, or it says nothing sensible (400, 413, 422)."""


class Unauthenticated(WhetError):
    """The API key is unknown, expired or revoked (401)."""


class Forbidden(WhetError):
    """The key lacks the scope, or whoever it acts as may not do this (403)."""


class NotFound(WhetError):
    """There is no such thing in the projects this key reaches (404)."""


class Conflict(WhetError):
    """The state has changed meanwhile, or an idempotency key was used for something else (409)."""


class LostLease(Conflict):
    """The item went to another reviewer; lease again."""


class Unavailable(WhetError):
    """Too busy, away, or not reachable, and still so after the last retry (429, 5xx, no connection)."""


def of_status(status: int) -> type[WhetError]:
    """The exception of an HTTP status."""
    if status in (401, 403, 404, 409):
        return {401: Unauthenticated, 403: Forbidden, 404: NotFound, 409: Conflict}[status]
    return Unavailable if status == 429 or status >= 500 else InvalidRequest
