"""Where a webhook may point, and how what is sent there is signed (the scheme of standardwebhooks.com, `v1`).

An address is refused unless it is plainly public: whoever may write a URL here must not make this machine speak to
its own network. With `WHET_WEBHOOK_PRIVATE_TARGETS` an operator opens loopback and private networks; link-local
addresses, where clouds keep their metadata services, stay shut even then.
"""

import base64
import hashlib
import hmac
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import NamedTuple
from urllib.parse import urlsplit
from uuid import UUID

from services.errors import InvalidRequest

LONGEST_URL = 2000
# After a rotation both secrets sign for this long.
OVERLAP = timedelta(hours=24)

Address = IPv4Address | IPv6Address
# What the IANA registries reserve, written out (Python's own tables differ by release), relays into IPv6, and the
# address at which Azure's own agent answers from inside a machine.
SHUT = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8", "169.254.0.0/16", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.18.0.0/15",
            "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32",
        ),
    )
)  # fmt: skip
UNICAST = IPv6Network("2000::/3")
# Teredo, 6to4 and documentation: the first two carry an IPv4 address that would go unchecked.
SHUT_6 = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16")))
# Opened by the setting, and nothing else is.
PRIVATE = tuple(map(IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "127.0.0.0/8")))
PRIVATE_6 = tuple(map(IPv6Network, ("::1/128", "fc00::/7")))
# Metadata services inside the private ranges (AWS over IPv6, Alibaba).
METADATA = frozenset(map(ip_address, ("fd00:ec2::254", "100.100.100.200")))


class Place(NamedTuple):
    """A checked URL taken apart; `host` in ASCII, without brackets."""

    url: str
    scheme: str
    host: str
    port: int


def checked(url: str, *, private: bool = False) -> Place:
    """Raises InvalidRequest with what is wrong. The host's addresses are checked when something is sent."""
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode() if parts.hostname else ""
    except (ValueError, UnicodeError) as error:
        raise _wrong("it is no address of the form https://host/path") from error
    if len(url) > LONGEST_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise _wrong(f"at most {LONGEST_URL} characters of ASCII, without spaces")
    if parts.scheme not in ("https", "http") or not host:
        raise _wrong("it is no address of the form https://host/path")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise _wrong("it may hold no user name, password or fragment")
    _refuse_literal(host, private=private)
    if parts.scheme == "http" and not (private and _is_loopback_name(host)):
        raise _wrong("it must be https (http only to this machine, where WHET_WEBHOOK_PRIVATE_TARGETS allows it)")
    return Place(url, parts.scheme, host, port or (443 if parts.scheme == "https" else 80))


def _refuse_literal(host: str, *, private: bool) -> None:
    address = literal(host)
    if address is not None and (why := refusal(address, private=private)):
        raise _wrong(f"{host} is {why}")


def _is_loopback_name(host: str) -> bool:
    address = literal(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def literal(host: str) -> Address | None:
    """The address a host is written as, if it is."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def refusal(address: Address, *, private: bool = False) -> str | None:
    """Why nothing is sent to an address; None when it may be. IPv4 in IPv6's clothes is looked at as IPv4."""
    if isinstance(address, IPv6Address):
        return _refusal_6(address, private=private)
    if address in METADATA:
        return "a metadata service"
    if any(address in network for network in PRIVATE):
        return None if private else "a private address"
    if address.is_link_local or any(address in network for network in SHUT) or not address.is_global:
        return "not a public address"
    return None


def _refusal_6(address: IPv6Address, *, private: bool) -> str | None:
    if address.scope_id is not None:
        return "not a public address"
    if address.ipv4_mapped is not None:
        return refusal(address.ipv4_mapped, private=private)
    if address in METADATA:
        return "a metadata service"
    if any(address in network for network in PRIVATE_6):
        return None if private else "a private address"
    # An allow list: NAT64, IPv4-compatible, site-local and link-local addresses all lie outside global unicast.
    if address not in UNICAST or any(address in network for network in SHUT_6) or not address.is_global:
        return "not a public address"
    return None


def _wrong(why: str) -> InvalidRequest:
    return InvalidRequest(f"this address cannot be a webhook: {why}", param="url")


# --- signatures -------------------------------------------------------------------------------------------


def secret(pepper: bytes, webhook_id: UUID, rotation: int) -> str:
    """`whsec_` and 32 bytes in base64: derived, so that no table holds it. Another pepper makes other secrets."""
    made = hmac.digest(pepper, f"webhook:{webhook_id}:{rotation}".encode(), hashlib.sha256)
    return f"whsec_{base64.b64encode(made).decode()}"


def secrets_of(pepper: bytes, webhook_id: UUID, rotation: int, rotated_at: datetime | None, now: datetime) -> list[str]:
    """Those that sign now: the newest, and for OVERLAP after a rotation the one before."""
    old = rotated_at is not None and rotation > 1 and now < rotated_at + OVERLAP
    return [secret(pepper, webhook_id, number) for number in ((rotation, rotation - 1) if old else (rotation,))]


def headers(message_id: str, body: bytes, signing: Sequence[str], *, at: int | None = None) -> dict[str, str]:
    """Id, time and signatures of one message. Receivers refuse what is older than five minutes."""
    moment = int(time.time()) if at is None else at
    signed = f"{message_id}.{moment}.".encode() + body
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(moment),
        "webhook-signature": " ".join(f"v1,{_sign(one, signed)}" for one in signing),
    }


def _sign(secret_text: str, signed: bytes) -> str:
    key = base64.b64decode(secret_text.removeprefix("whsec_"))
    return base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
