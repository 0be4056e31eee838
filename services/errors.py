"""Errors that know their HTTP status; one handler in `services/app.py` renders them in OpenAI's shape."""

# What the log keeps of a request that found no adapter slot: the machine's want, so no canary is judged by it.
NO_SLOT = "adapters push one another out: there are too few adapter slots"


class WhetError(Exception):
    """An expected failure with a sentence for the caller. `status` is the HTTP status it answers with, `retry_after`
    the seconds after which trying again makes sense, if it does."""

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after: float | None = None

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def body(self) -> dict[str, object]:
        """The error as OpenAI's clients expect it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(WhetError):
    status = 400
    type = "invalid_request_error"


class Unauthenticated(WhetError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(WhetError):
    status = 403
    type = "permission_error"
    code = "insufficient_scope"


class NotFound(WhetError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(WhetError):
    """The state changed under the caller (lost lease, stale generation, job already running)."""

    status = 409
    type = "conflict_error"
    code = "conflict"


class TooLarge(WhetError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class Unprocessable(WhetError):
    status = 422
    type = "invalid_request_error"


class Overloaded(WhetError):
    """More is asked than can be done now."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(WhetError):
    """The time the caller gave has passed."""

    status = 504
    type = "timeout_error"
    code = "deadline"


class Unavailable(WhetError):
    """A part this request needs is away (engine restarting, spool full); worth retrying."""

    status = 503
    type = "server_error"
    code = "unavailable"
    retry_after = 1.0
