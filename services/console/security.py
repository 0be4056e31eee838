"""What every answer of the console carries, and the refusal of requests another site made a browser send."""

from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.errors import Forbidden

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
POLICY = "; ".join(
    [
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:", "connect-src 'self'",
        "font-src 'self'", "form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'",
    ]
)  # fmt: skip
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: that would turn the Origin of our own forms into "null". Links elsewhere still send nothing.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Source(NamedTuple):
    """Where a browser says a request came from."""

    trusted: bool
    said: str


def source_of(headers: Headers, public_url: str) -> Source:
    """Sec-Fetch-Site is the browser's own word; older browsers send only Origin. Scripts send neither, and no cookie
    that another site could have borrowed."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return Source(site == "same-origin", f"Sec-Fetch-Site: {site}")
    origin = headers.get("origin")
    if origin is None:
        return Source(True, "no browser")
    own = {headers.get("host", "")} | ({urlsplit(public_url).netloc} if public_url else set())
    return Source(urlsplit(origin).netloc in own - {""}, f"Origin: {origin}")


class Shield:
    """ASGI middleware: the headers above on every answer, 403 for unsafe requests from other sites.

    The JSON API is left out of the second: it takes no cookie, so there is nothing to borrow.
    """

    def __init__(self, app: ASGIApp, *, public_url: str = "") -> None:
        self.app = app
        self.public_url = public_url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers["Cache-Control"] = _kept(scope["path"])
            await send(message)

        app = self.app
        if scope["method"] not in SAFE_METHODS and not scope["path"].startswith("/api/"):
            source = source_of(Headers(scope=scope), self.public_url)
            if not source.trusted:
                error = Forbidden(f"this request did not come from the console itself ({source.said})", code="origin")
                app = JSONResponse(error.body(), status_code=error.status)
        await app(scope, receive, send_with_headers)


def _kept(path: str) -> str:
    """How long browsers keep an answer. Pages hold people's data. Scripts and styles are asked for each time, which
    costs a 304: left to guess, a browser would run half of an old release with half of the new one."""
    if not path.startswith("/static/"):
        return "no-store"
    return "no-cache" if path.endswith((".js", ".css")) else "max-age=86400"
