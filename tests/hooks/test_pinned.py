"""Nothing is sent but to a checked public address, over verified TLS, within bounds."""

import ssl
import time
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path

import pytest

from services.errors import InvalidRequest
from services.store.webhook_rules import Address, checked, refusal
from tests.hooks.receiver import Detour, certify, drip, endless_body, flood, receiving
from worker.hooks import pinned

PUBLIC = "93.184.215.14"
HEADERS = {"content-type": "application/json"}

# Every way that is known to name a place inside.
INSIDE = [
    "127.0.0.1", "127.255.255.254", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1",
    "100.127.255.255", "169.254.169.254", "169.254.0.1", "0.0.0.0", "0.1.2.3", "255.255.255.255", "224.0.0.1",
    "239.255.255.255", "240.0.0.1", "192.0.0.8", "192.0.2.1", "198.18.0.1", "198.51.100.7", "203.0.113.9",
    "192.88.99.1", "168.63.129.16", "100.100.100.200",
    "::1", "::", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "fe80::1",
    "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "2001:db8::1", "100::1", "3fff::1", "::ffff:0:127.0.0.1",
]  # fmt: skip
METADATA = ["169.254.169.254", "fd00:ec2::254", "100.100.100.200", "fe80::1", "::ffff:169.254.169.254"]


class Resolver:
    """Answers in turn, the last one for ever after; it counts how often it is asked."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = [list(map(ip_address, answer)) for answer in answers]
        self.asked = 0

    def __call__(self, host: str, port: int) -> list[Address]:
        self.asked += 1
        return self._answers[min(self.asked, len(self._answers)) - 1]


@pytest.mark.parametrize("address", INSIDE)
def test_no_address_that_is_not_public_is_spoken_to(address: str) -> None:
    assert refusal(ip_address(address)) is not None


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::ffff:8.8.8.8"])
def test_public_addresses_are(address: str) -> None:
    assert refusal(ip_address(address)) is None


def test_the_setting_opens_private_networks_and_never_metadata() -> None:
    for address in ("127.0.0.1", "10.1.2.3", "::1", "fd12::1", "192.168.0.9", "::ffff:127.0.0.1"):
        assert refusal(ip_address(address), private=True) is None, address
    for address in METADATA:
        assert refusal(ip_address(address), private=True) is not None, address


@pytest.mark.parametrize("url", [
    "http://hook.example/x", "ftp://hook.example", "https://", "//hook.example", "https://user:word@hook.example/",
    "https://hook.example/#part", "https://127.0.0.1/", "https://[::1]/", "https://[::ffff:127.0.0.1]/", "javascript:x",
    "https://169.254.169.254/latest/meta-data", "https://hook.example:99999/", "https://hook.example/\n", "file:///etc",
    "https://hook.example/ x", "https://" + "a" * 2100 + ".example", "https://hook.example:0x50/", "https://a..b/",
    "http://localhost:9/", "http://127.0.0.1:9/", "https://[fe80::1%25eth0]/", "https://hö.example/",
])  # fmt: skip
def test_an_address_that_cannot_be_a_webhook_is_refused_when_it_is_written(url: str) -> None:
    with pytest.raises(InvalidRequest):
        checked(url)


def test_plain_http_reaches_this_machine_only_and_only_where_it_is_allowed() -> None:
    assert checked("http://127.0.0.1:8765/x", private=True).port == 8765
    assert checked("http://[::1]/", private=True).host == "::1"
    for url in ("http://hook.example/", "http://10.0.0.1/", "http://127.0.0.1.hook.example/"):
        with pytest.raises(InvalidRequest):
            checked(url, private=True)
    # A name for this machine that somebody's resolver points elsewhere.
    with pytest.raises(pinned.NotSent, match="all that http may reach"):
        pinned.allowed(checked("http://localhost/", private=True), private=True, resolve=Resolver(["10.0.0.1"]))


def test_a_name_that_rebinds_is_looked_up_once_and_the_connection_stays_with_what_was_checked(tmp_path: Path) -> None:
    certificate, context = certify(tmp_path, ["hook.example"])
    resolver = Resolver([PUBLIC], ["127.0.0.1"])
    with receiving(certificate) as receiver:
        detour = Detour(receiver.port)
        outcome = pinned.post(
            checked("https://hook.example/in"), HEADERS, b"{}", private=False, resolve=resolver, backend=detour,
            context=context,
        )  # fmt: skip
    assert (outcome.status, outcome.error) == (204, None)
    assert resolver.asked == 1
    assert detour.dialled == [PUBLIC]
    path, headers, body = receiver.came[0]
    assert (path, headers["host"], body) == ("/in", "hook.example", b"{}")


@pytest.mark.parametrize("answer", [["127.0.0.1"], [PUBLIC, "127.0.0.1"], ["::ffff:10.0.0.1"], ["64:ff9b::7f00:1"], []])
def test_one_address_inside_is_enough_to_send_nothing(answer: list[str]) -> None:
    detour = Detour(9)
    outcome = pinned.post(
        checked("https://hook.example/"), HEADERS, b"{}", private=False, resolve=Resolver(answer), backend=detour
    )
    assert outcome.status is None
    assert "hook.example" in (outcome.error or "")
    assert "127.0.0.1" not in (outcome.error or "")
    assert detour.dialled == []


def test_a_written_address_is_not_resolved_and_other_spellings_of_loopback_are_seen_through() -> None:
    for url in ("https://2130706433/", "https://0x7f.1/", "https://127.1/", "https://0177.0.0.1/"):
        detour = Detour(9)
        outcome = pinned.post(checked(url), HEADERS, b"", private=False, backend=detour)
        assert outcome.status is None, url
        assert detour.dialled == [], url


@pytest.mark.parametrize(
    ("names", "expired"), [(["other.example"], False), (["hook.example"], True), (["93.184.215.14"], False)]
)
def test_tls_is_verified_against_the_name_and_not_against_the_address(
    tmp_path: Path, names: list[str], expired: bool
) -> None:
    certificate, context = certify(tmp_path, names, expired=expired)
    with receiving(certificate) as receiver:
        outcome = pinned.post(
            checked("https://hook.example/"), HEADERS, b"{}", private=False, resolve=Resolver([PUBLIC]),
            backend=Detour(receiver.port), context=context,
        )  # fmt: skip
    assert outcome.status is None
    assert "certificate" in (outcome.error or "")
    assert receiver.came == []


def test_an_unknown_authority_is_not_trusted(tmp_path: Path) -> None:
    certificate, _ = certify(tmp_path, ["hook.example"])
    with receiving(certificate) as receiver:
        outcome = pinned.post(
            checked("https://hook.example/"), HEADERS, b"{}", private=False, resolve=Resolver([PUBLIC]),
            backend=Detour(receiver.port),
        )  # fmt: skip
    assert "certificate" in (outcome.error or "")
    assert receiver.came == []


def test_no_redirect_is_followed() -> None:
    with receiving() as receiver, receiving() as inside:
        receiver.status, receiver.location = 302, f"http://127.0.0.1:{inside.port}/secret"
        outcome = local(receiver.port)
    assert (outcome.status, outcome.error) == (302, "answered 302, and redirects are not followed")
    assert inside.came == []


@pytest.mark.parametrize("misbehave", [drip, flood])
def test_an_answer_that_never_ends_is_cut_off(misbehave: Callable[..., None]) -> None:
    with receiving() as receiver:
        receiver.misbehave = misbehave
        started = time.monotonic()
        outcome = local(receiver.port, seconds=1.0)
        assert time.monotonic() - started < 2.0
    assert outcome.status is None
    assert outcome.error


def test_the_body_of_an_answer_is_not_read() -> None:
    with receiving() as receiver:
        receiver.misbehave = endless_body
        started = time.monotonic()
        assert local(receiver.port, seconds=5.0).status == 200
        assert time.monotonic() - started < 1.0


def test_a_receiver_that_is_away_is_an_outcome_and_no_error() -> None:
    with receiving() as receiver:
        port = receiver.port
    outcome = local(port)
    assert (outcome.status, outcome.error) == (None, "no connection to 127.0.0.1")


def test_a_resolver_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_args, **_named: time.sleep(1.5) or [])
    started = time.monotonic()
    outcome = pinned.post(checked("https://hook.example/"), HEADERS, b"", private=False, seconds=0.3)
    assert time.monotonic() - started < 1.0
    assert outcome.error == "hook.example has no address"


def test_the_environment_puts_no_proxy_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with receiving() as receiver:
        assert local(receiver.port).status == 204


def local(port: int, seconds: float = 5.0) -> pinned.Outcome:
    """A POST to this machine, as the setting allows it."""
    place = checked(f"http://127.0.0.1:{port}/in", private=True)
    return pinned.post(place, HEADERS, b"{}", private=True, seconds=seconds)


def test_contexts_check_names_and_refuse_old_tls() -> None:
    context = pinned.trusted()
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
