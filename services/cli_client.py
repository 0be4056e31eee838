"""How the `whet` command talks to a running platform: the admin API over HTTP, failures as sentences."""

import json
import os
from collections.abc import Iterator
from typing import Any

import httpx

from services.errors import Forbidden, Unauthenticated, Unavailable, WhetError
from services.settings import Settings

TIMEOUT_SECONDS = 30.0


class AdminClient:
    """The admin API at WHET_URL with WHET_API_KEY; without them, the platform of this home."""

    def __init__(self, settings: Settings) -> None:
        known = _credentials(settings)
        self.url = os.environ.get("WHET_URL") or known.get("console_url") or settings.console_url
        key = os.environ.get("WHET_API_KEY") or known.get("admin_key", "")
        if not key:
            raise Unauthenticated(
                f"no API key: {settings.home} has no credentials. Start the platform with `whet up`, or set "
                "WHET_API_KEY (and WHET_URL) to reach another one"
            )
        headers = {"authorization": f"Bearer {key}"}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_SECONDS)

    def get(self, path: str, **parameters: object) -> dict[str, Any]:
        """The answer's JSON. Raises WhetError with the platform's own sentence."""
        return self._send("GET", path, parameters={name: str(value) for name, value in parameters.items()})

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """As `get`."""
        return self._send("POST", path, body=body or {})

    def put(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """As `get`."""
        return self._send("PUT", path, body=body)

    def upload(self, path: str, content: bytes, **parameters: object) -> dict[str, Any]:
        """Send a file. As `get`."""
        named = {name: str(value) for name, value in parameters.items()}
        return self._send("POST", path, parameters=named, content=content)

    def lines(self, path: str, **parameters: object) -> Iterator[str]:
        """The answer's lines as they come. Raises as `get` does."""
        named = {name: str(value) for name, value in parameters.items()}
        try:
            with self._http.stream("GET", path, params=named) as response:
                if not response.is_success:
                    response.read()
                    raise _failure(response, self.url)
                # Not iter_lines, which also breaks at U+2028 and the like inside a string.
                rest = b""
                for chunk in response.iter_bytes():
                    *whole, rest = (rest + chunk).split(b"\n")
                    yield from (line.decode() for line in whole)
        except httpx.HTTPError as error:
            raise Unavailable(f"{self.url} did not answer properly: {error or type(error).__name__}") from None

    def delete(self, path: str) -> dict[str, Any]:
        """As `get`."""
        return self._send("DELETE", path)

    def _send(
        self,
        method: str,
        path: str,
        *,
        parameters: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
        content: bytes | None = None,
    ) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, params=parameters, json=body, content=content)
        except httpx.ConnectError:
            raise Unavailable(f"nothing answers at {self.url}: start the platform with `whet up`") from None
        except httpx.HTTPError as error:
            raise Unavailable(f"{self.url} did not answer properly: {error or type(error).__name__}") from None
        if response.is_success:
            found: dict[str, Any] = response.json()
            return found
        raise _failure(response, self.url)


def _credentials(settings: Settings) -> dict[str, str]:
    path = settings.home / "credentials.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except PermissionError:
        raise Forbidden(f"{path} belongs to somebody else: set WHET_API_KEY to a key of your own") from None
    return {str(name): str(value) for name, value in found.items()}


def _failure(response: httpx.Response, url: str) -> WhetError:
    said = _sentence(response)
    if response.status_code == 401:
        return Unauthenticated(
            f"{url} refused the key: {said}. Set WHET_API_KEY, or restart `whet up` to make a new one"
        )
    if response.status_code == 403:
        return Forbidden(f"the key may not do this: {said}")
    return WhetError(said)


def _sentence(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"
