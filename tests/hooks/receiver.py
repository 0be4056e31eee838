"""A webhook receiver on loopback, with a certificate of its own authority, that answers as a test asks it to."""

import ipaddress
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpcore
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from worker.hooks import pinned


@dataclass
class Receiver:
    """What came, and how it is answered: a status, or a function that writes to the socket itself."""

    port: int = 0
    status: int = 204
    location: str | None = None
    misbehave: Callable[[BaseHTTPRequestHandler], None] | None = None
    came: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)


@contextmanager
def receiving(certificate: Path | None = None) -> Iterator[Receiver]:
    """Over TLS when a certificate is given."""
    told = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            told.came.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            if told.misbehave is not None:
                told.misbehave(self)
                return
            self.send_response(told.status)
            if told.location:
                self.send_header("location", told.location)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    told.port = server.server_port
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        thread.join(5)
        server.server_close()


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A header a tenth of a second, for ever: each read succeeds, the answer never comes."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(200):
        try:
            handler.wfile.write(f"x-{number}: y\r\n".encode())
            handler.wfile.flush()
        except OSError:
            return
        time.sleep(0.1)


def flood(handler: BaseHTTPRequestHandler) -> None:
    """Headers without end, as fast as they are read."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
    try:
        for _ in range(2000):
            handler.wfile.write(b"y" * 65536)
    except OSError:
        return


def endless_body(handler: BaseHTTPRequestHandler) -> None:
    """A good status, and then more than anybody wants."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n")
    try:
        for _ in range(2000):
            handler.wfile.write(b"y" * 65536)
    except OSError:
        return


class Detour(httpcore.NetworkBackend):
    """Notes which address was dialled and connects to a port of this machine instead: tests reach no other."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._real = httpcore.SyncBackend()
        self.dialled: list[str] = []

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None,
        socket_options: pinned.Options = None,
    ) -> httpcore.NetworkStream:  # fmt: skip
        self.dialled.append(host)
        return self._real.connect_tcp("127.0.0.1", self._port, timeout=timeout)


# --- certificates -----------------------------------------------------------------------------------------


def certify(directory: Path, names: Sequence[str], *, expired: bool = False) -> tuple[Path, ssl.SSLContext]:
    """A certificate for these names, and a context that trusts its authority and checks names."""
    authority, signer = _authority()
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    alternatives = [_alternative(name) for name in names]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "receiver")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=9))
        .not_valid_after(now + timedelta(days=-1 if expired else 9))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    path = directory / f"{names[0].replace('*', 'any')}{'-expired' if expired else ''}.pem"
    plain = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + certificate.public_bytes(pem))
    context = ssl.create_default_context(cadata=authority.public_bytes(pem).decode())
    return path, context


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _authority() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=10))
        .not_valid_after(now + timedelta(days=10))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return made, key
