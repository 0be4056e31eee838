"""One POST to a public address and to no other: the name is resolved once, every address it has is checked, and the
connection goes to those addresses while TLS is verified against the name.

A name that resolves to something public when it is checked and to something private when it is connected to (DNS
rebinding) gains nothing: there is no second look. No redirect is followed, no proxy of the environment is used, the
answer's body is never read, and one deadline covers it all.
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import certifi
import httpcore

from services.store.webhook_deliveries import Outcome
from services.store.webhook_rules import Address, Place, literal, refusal

SECONDS = 10.0
ADDRESSES_MOST = 8

Resolve = Callable[[str, int], Sequence[Address]]
Options = Iterable[Any] | None


class NotSent(Exception):
    """Why nothing was sent, in words that name no address of ours."""


def post(
    place: Place,
    headers: Mapping[str, str],
    body: bytes,
    *,
    private: bool,
    resolve: Resolve | None = None,
    backend: httpcore.NetworkBackend | None = None,
    context: ssl.SSLContext | None = None,
    seconds: float = SECONDS,
) -> Outcome:
    """Send `body` and wait for the status. Never raises for what a receiver does; `seconds` bound all of it."""
    started = time.monotonic()
    deadline = started + seconds
    try:
        addresses = allowed(place, private=private, resolve=resolve or resolver(seconds))
        pinned = Pinned(addresses, deadline, backend or httpcore.SyncBackend())
        status = _exchange(place, headers, body, pinned, context or trusted())
        error = None if 200 <= status < 300 else _refused(status)
    except NotSent as why:
        status, error = None, str(why)
    return Outcome(status, error, round(1000 * (time.monotonic() - started), 1))


def allowed(place: Place, *, private: bool, resolve: Resolve) -> Sequence[Address]:
    """Every address of the host. Raises NotSent when there is none, or one that is refused."""
    written = literal(place.host)
    addresses = [written] if written else list(resolve(place.host, place.port))[:ADDRESSES_MOST]
    if not addresses:
        raise NotSent(f"{place.host} has no address")
    for address in addresses:
        why = refusal(address, private=private)
        if why is None and place.scheme == "http" and not address.is_loopback:
            why = "not this machine, which is all that http may reach"
        if why is not None:
            raise NotSent(f"{place.host} resolves to what is {why}")
    return addresses


def resolver(seconds: float) -> Resolve:
    """The system's, given up after `seconds`: its own patience is a file's affair."""

    def resolve(host: str, port: int) -> Sequence[Address]:
        found: list[Address] = []

        def ask() -> None:
            try:
                answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError):
                return
            found.extend(address for answer in answers if (address := literal(str(answer[4][0]))) is not None)

        thread = threading.Thread(target=ask, name="resolve", daemon=True)
        thread.start()
        thread.join(seconds)
        return list(dict.fromkeys(found))

    return resolve


def trusted() -> ssl.SSLContext:
    """Certificates of the system and of certifi; names are checked."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _exchange(place: Place, headers: Mapping[str, str], body: bytes, pinned: "Pinned", context: ssl.SSLContext) -> int:
    pool = httpcore.ConnectionPool(ssl_context=context, network_backend=pinned, max_connections=1, retries=0)
    with pool:
        try:
            with pool.stream("POST", place.url, headers=list(headers.items()), content=body) as response:
                return int(response.status)
        except httpcore.TimeoutException as error:
            raise NotSent(f"{place.host} did not answer in time") from error
        except httpcore.ConnectError as error:
            raise _unconnected(place, str(error)) from error
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
            raise NotSent(f"{place.host} broke the connection off, or answered no HTTP") from error


def _unconnected(place: Place, why: str) -> NotSent:
    """OpenSSL's own words say which of the ways to be wrong it was; others name addresses."""
    return NotSent(
        f"no trusted connection to {place.host}: {why[:200]}" if "SSL" in why else f"no connection to {place.host}"
    )


def _refused(status: int) -> str:
    return f"answered {status}, and redirects are not followed" if 300 <= status < 400 else f"answered {status}"


class Pinned(httpcore.NetworkBackend):
    """Connects to the checked addresses, in their order, whatever the name says by now."""

    def __init__(self, addresses: Sequence[Address], deadline: float, backend: httpcore.NetworkBackend) -> None:
        self._addresses = addresses
        self._deadline = deadline
        self._backend = backend

    def connect_tcp(
        self,
        host: str,  # noqa: ARG002 - the name has been looked up once, and is not again
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - the deadline is stricter
        local_address: str | None = None,
        socket_options: Options = None,
    ) -> httpcore.NetworkStream:
        last: Exception = httpcore.ConnectError("no address")
        for place, address in enumerate(self._addresses):
            share = left(self._deadline) / (len(self._addresses) - place)
            try:
                stream = self._backend.connect_tcp(
                    str(address), port, timeout=share, local_address=local_address, socket_options=socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last = error
            else:
                return Bounded(stream, self._deadline)
        raise last

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, left(self._deadline)))


class Bounded(httpcore.NetworkStream):
    """A stream on which no read or write outlives the deadline, however slowly the other side drips."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        return self._stream.read(max_bytes, timeout=left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        self._stream.write(buffer, timeout=left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        inner = self._stream.start_tls(ssl_context, server_hostname=server_hostname, timeout=left(self._deadline))
        return Bounded(inner, self._deadline)

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - httpcore's own signature
        return self._stream.get_extra_info(info)


def left(deadline: float) -> float:
    """Seconds until the deadline, more than 0: a socket takes 0 for "do not wait". Raises ReadTimeout after it."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise httpcore.ReadTimeout("the deadline has passed")
    return seconds
