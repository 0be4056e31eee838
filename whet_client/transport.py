"""One HTTP request with retries: every call may be repeated without harm, for no longer than it makes sense."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from whet_client.errors import InvalidRequest, LostLease, Unavailable, WhetError, of_status

RETRIED = (429, 502, 503, 504)
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 8.0


class Transport:
    """Requests to one address with one API key. `retries` are tries after the first."""

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        timeout: float,
        retries: int,
        sleep: Callable[[float], None] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retries = retries
        self._sleep = sleep
        self._http = httpx.Client(
            base_url=base_url,
            headers={"authorization": f"Bearer {api_key}", "user-agent": "whet-client"},
            timeout=timeout,
            transport=transport,
        )

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        parameters: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> dict[str, Any]:
        """The answer's JSON. Every call here may be repeated: the platform stores the same one once.

        Raises WhetError; Unavailable after the last retry.
        """
        headers = {"idempotency-key": idempotency_key} if idempotency_key else None
        for attempt in range(self._retries + 1):
            last = attempt == self._retries
            try:
                response = self._http.request(method, path, json=body, params=parameters, headers=headers)
            except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
                raise InvalidRequest(f"this cannot be sent to {self._http.base_url}: {error}") from error
            except httpx.TransportError as error:
                if last:
                    raise Unavailable(
                        f"{self._http.base_url} did not answer: {error or type(error).__name__}"
                    ) from error
                self._sleep(_pause(attempt))
                continue
            if response.status_code in RETRIED and not last:
                self._sleep(_asked(response) or _pause(attempt))
                continue
            return _answer(response)
        raise AssertionError("unreachable: the last attempt returns or raises")


def _pause(attempt: int) -> float:
    """Growing, and jittered so that many clients do not come back together. Seconds."""
    return min(FIRST_PAUSE_SECONDS * 2.0**attempt, LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1)


def _asked(response: httpx.Response) -> float | None:
    """What Retry-After asks for, in seconds, within reason."""
    said: str = response.headers.get("retry-after", "")
    return min(float(said), LONGEST_PAUSE_SECONDS) if said.isdigit() else None


def _answer(response: httpx.Response) -> dict[str, Any]:
    try:
        document = response.json()
    except ValueError:
        document = None
    if response.is_success and isinstance(document, dict):
        return document
    raise _failure(response.status_code, document)


def _failure(status: int, document: object) -> WhetError:
    said = document.get("error") if isinstance(document, dict) else None
    if not isinstance(said, dict):
        return of_status(status)(f"the answer is no JSON of the platform's (status {status})", status=status)
    kind = LostLease if said.get("code") == "lost_lease" else of_status(status)
    return kind(str(said.get("message")), status=status, code=said.get("code"), param=said.get("param"))
